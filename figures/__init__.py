"""All figures, and the reports that contain them."""
