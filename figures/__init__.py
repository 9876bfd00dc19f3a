"""All figures, and the reports that hold them."""
