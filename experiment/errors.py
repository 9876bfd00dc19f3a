"""What can go wrong in more than one module.

What a user can do wrong is a WrongInputError: every module's own error for it is of this kind. The
libraries have errors of their own, which a command names to run_command.
"""


class WrongInputError(ValueError):
    """Wrong input; the message is one line that says what is wrong and what would be right."""


class NonFiniteError(FloatingPointError):
    """A loss or hypergradient that is not finite, and where it arose."""
