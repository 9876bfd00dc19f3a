"""What can go wrong with learned optimisers."""


class OptimizerError(ValueError):
    """What is wrong with a learned optimiser or its use, and what would be right, in one line."""


class NonFiniteError(FloatingPointError):
    """A gradient that is not finite; nothing was changed."""
