"""The error of wrong input: the command line prints it as one line and exits with code 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What was asked for cannot be done; the message says the rule, what was given and the way out."""


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Let errors of a loader name `flag` where it is not --data that the data was given by."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data", flag)) from None
