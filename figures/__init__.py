"""All drawing, and the reports that draw."""
