"""The error of wrong input: the command line prints it as one line and exits with code 2."""


class InputError(ValueError):
    """What was asked for cannot be done; the message says the rule, what was given and the way out."""
