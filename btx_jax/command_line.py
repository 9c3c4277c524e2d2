"""How every command ends when something goes wrong that a user can mend: one line, no traceback."""

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
    """Around the body of a command: errors become one line. When the reader of its output has gone,
    as in `| head`, the command ends as any program does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would flush once more
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if of_bucket := buckets.told(error):
            fail(of_bucket)
        if not isinstance(error, OSError):
            raise
        # a disk that is full or read-only, a file where a directory should be
        fail(f"{error.filename or 'cannot write'}: {error.strerror or error}")
