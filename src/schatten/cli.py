"""The command line: `schatten COMMAND`, or `python -m schatten COMMAND`.

Wrong input ends with one line on standard error and exit code 2; an interrupted run with 130.
"""

import errno
import sys


def main() -> None:
    """Entry point of the `schatten` command."""
    try:
        from schatten.lab.commands import app
    except ImportError as error:
        _fail(f"the command line needs {error.name}: pip install 'schatten[lab]'")
    from schatten.lab.errors import InputError

    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'the output folder'} cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues from the last save", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
