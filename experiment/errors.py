"""What can go wrong in more than one module.

What a user can do wrong is a WrongInputError: every module's own error for it is of this kind. The
libraries have errors of their own, which a command names to run_command.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class WrongInputError(ValueError):
    """Wrong input; the message is one line that says what is wrong and what would be right."""


class RunLogError(WrongInputError):
    """A run directory that can't be written, read or resumed; the message is one line."""


class NonFiniteError(FloatingPointError):
    """A loss or hypergradient that is not finite, and where it arose."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an error of the operating system into a RunLogError: `what`, and why."""
    try:
        yield
    except OSError as error:
        raise RunLogError(f"{what}: {error.strerror or error}") from error
