"""The errors of this package."""


class CompetitionError(ValueError):
    """Wrong options, inputs or files; the message is one line and says what would be right."""


class NonFiniteError(FloatingPointError):
    """A training has produced numbers that are not finite; the message says where."""
