"""The error of this package."""


class OnePassError(ValueError):
    """Wrong settings or values; the message is one line and says what would be right."""
