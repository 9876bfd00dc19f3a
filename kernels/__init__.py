"""The mathematics that makes the main job fast: local polynomials, logistic regression, lateral dynamics."""
