"""What can go wrong in one-pass tuning."""


class OnePassError(ValueError):
    """Settings or values that this algorithm can't work with, and what would be right: one line."""
