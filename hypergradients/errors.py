"""What can go wrong in a method."""


class HypergradientError(ValueError):
    """What is wrong with what a method was given, and what would be right, in one line."""


class DivergenceError(HypergradientError, FloatingPointError):
    """A linear system that was not solved, and its residual."""


class DivergenceWarning(RuntimeWarning):
    """The same, where what was reached is wanted nevertheless."""
