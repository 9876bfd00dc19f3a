"""Errors that more than one module raises.

Every error that a user can cause derives from WrongInputError, except those of the libraries, which
don't import this module; a command passes the types of these to run_command.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class WrongInputError(ValueError):
    """Wrong input by the user; the message is one line with what is wrong and what is expected."""


class RunLogError(WrongInputError):
    """A run directory that can't be written, read or resumed; the message is one line."""


class NonFiniteError(FloatingPointError):
    """A loss or hypergradient is not finite; the message says where it arose."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a RunLogError with the message "<what>: <reason>"."""
    try:
        yield
    except OSError as error:
        raise RunLogError(f"{what}: {error.strerror or error}") from error
