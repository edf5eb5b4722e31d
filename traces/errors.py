"""The one exception of the program: input a person can mend."""


class InputError(ValueError):
    """Bad input or usage, told in one line: file, row, field, what was expected. The command exits with 2 on it."""
