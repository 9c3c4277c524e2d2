"""A directory that appears finished or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from btx_jax.errors import UserError


def check_free(target: Path) -> None:
    """Raises UserError when something is already there: nothing is overwritten."""
    if target.exists():
        raise UserError(f"{target} exists; delete it or choose another name")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A hidden directory beside the target, renamed to it at the end of the block, or deleted when the block fails.

    A killed process leaves `.NAME.partial`, which the next attempt removes. Raises UserError when the target exists or the disk
    cannot take it.
    """
    check_free(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
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


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
