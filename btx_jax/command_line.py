"""How commands report errors that users can fix: in one line, without a traceback."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from btx_jax import buckets, terminal
from btx_jax.errors import UserError, one_line


def fail(message: object) -> NoReturn:
    """Print one line to stderr and exit with status 2."""
    terminal.error(one_line(message))
    sys.exit(2)


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Context for the body of a command: errors become one line. When the reader of its output is
    gone, as in `| head`, the command ends like any program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # None if the shell has closed it
                sys.stdout.flush()
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # prevents another flush by the interpreter
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if of_bucket := buckets.told(error):
            fail(of_bucket)
        if not isinstance(error, OSError):
            raise
        # such as a full or read-only disk, or a file in place of a directory
        fail(f"{error.filename or 'cannot write'}: {error.strerror or error}")
