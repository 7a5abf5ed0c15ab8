"""The command line: `schatten COMMAND`, or `python -m schatten COMMAND`.

Wrong input ends with one line on standard error and exit code 2.
"""

import errno
import logging
import sys
from typing import NoReturn


def main() -> None:
    """Entry point of the `schatten` command."""
    try:
        from schatten.lab.commands import app
    except ImportError as error:
        _fail(f"the command line needs {error.name}: pip install 'schatten[lab]'")
    from schatten.lab.errors import InputError

    # accelerate announces at every save that tied weights are stored once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'the output folder'} cannot be written: {error.strerror}.")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
