"""What can go wrong with competing units."""


class CompetitionError(ValueError):
    """What is wrong with layers, a training or their inputs, and what would be right: one line."""


class NonFiniteError(FloatingPointError):
    """A training that left the finite, and where."""
