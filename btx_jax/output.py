"""A directory or a file that appears finished or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from btx_jax.errors import UserError

CONFIG, DONE = "config.json", "done.json"  # of a run: while it runs, and when it has finished


def check_free(target: Path) -> None:
    """Raises UserError when something is already there: nothing is overwritten."""
    if "\0" in str(target):
        raise UserError(f"cannot write {str(target)[:200]!r}: no name of a file")
    try:
        exists = target.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {str(target)[:200]!r}: {error}") from error
    if exists:
        raise UserError(f"{target} exists; delete it or choose another name")


@contextlib.contextmanager
def none_left_empty(*directories: Path) -> Iterator[None]:
    """When the block fails, those of the directories and of their parents that it made and left
    empty are gone again."""
    missing = {
        p: None
        for directory in directories
        for p in (directory, *directory.parents)
        if not p.exists()
    }
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError, ValueError):  # not made, or not empty
                path.rmdir()
        raise


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A hidden directory beside the target, renamed to it at the end of the block, or deleted when
    the block fails.

    A killed process leaves `.NAME.partial-*`, which the next attempt removes; those of living
    processes are locked and left alone. Raises UserError when the target exists or the disk cannot
    take it.
    """
    check_free(target)
    with none_left_empty(target.parent), _new_directory(target) as partial:
        yield partial


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
            with contextlib.suppress(OSError), locked(left_over):
                shutil.rmtree(left_over)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        partial.chmod(0o777 & ~_umask())
        with locked(partial):
            try:
                yield partial
                for folder, _, files in os.walk(partial):
                    for path in (folder, *(os.path.join(folder, file) for file in files)):
                        _fsync(path)
                check_free(target)
                partial.rename(target)
                _fsync(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A hidden file beside the target, renamed to it at the end of the block, whatever is there, or
    deleted when the block fails.

    Its name is nobody else's: process ids are not enough, in containers every run is process 1.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError, an OSError, when another process of this machine holds it. The lock
    ends with the process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
