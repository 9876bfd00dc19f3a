"""What a user can do wrong: every module's own error for it is of this kind."""


class WrongInputError(ValueError):
    """Wrong input; the message is one line that says what is wrong and what would be right."""
