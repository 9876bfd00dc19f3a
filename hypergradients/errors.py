"""The errors and the warning of this package."""


class HypergradientError(ValueError):
    """Wrong arguments of a method; the message is one line and says what would be right."""


class DivergenceError(HypergradientError, FloatingPointError):
    """A linear system has not been solved; the message gives the residual."""


class DivergenceWarning(RuntimeWarning):
    """As DivergenceError, if the approximate solution is to be used nevertheless."""
