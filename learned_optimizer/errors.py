"""The errors of this package."""


class OptimizerError(ValueError):
    """A learned optimiser or its use is wrong; the message is one line and says what is right."""


class NonFiniteError(FloatingPointError):
    """A gradient is not finite; nothing has been changed."""
