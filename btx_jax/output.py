"""Directories and files that appear completely or not at all, and locks; on a disk or in a
bucket."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from btx_jax import buckets
from btx_jax.claims import claimed
from btx_jax.errors import UserError

PARTIAL = ".partial-"
WAIT = 1.0  # seconds between checks for another process's upload


def check_free(target: Path) -> None:
    """Raise UserError when something exists already: nothing is overwritten."""
    if "\0" in str(target):
        raise UserError(f"cannot write {str(target)[:200]!r}: not a file name")
    buckets.require(target, f"cannot write {target}")
    try:
        exists = is_there(target)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {str(target)[:200]!r}: {error}") from error
    if exists:
        raise UserError(f"{target} exists; delete it or choose another name")


def is_there(target: Path) -> bool:
    """Whether a result of `new_directory` or `new_file` exists and is complete."""
    return buckets.is_taken(target) if buckets.is_on_bucket(target) else target.exists()


_unfinished: set[Path] = set()  # in this process


@contextlib.contextmanager
def none_left_empty(*directories: Path) -> Iterator[None]:
    """If the block fails, delete directories, including parents, that it created and left empty."""
    missing = {
        p: None
        for directory in directories
        if not buckets.is_on_bucket(directory)  # buckets have no empty directories
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
    """Yield a hidden directory next to the target. At the end of the block it is renamed to the
    target; if the block fails, it is deleted. For a target in a bucket, yield a local temporary
    directory, which is uploaded.

    A killed process leaves `.NAME.partial-*`, or an upload marked as unfinished, which the next
    attempt removes; those of running processes are locked and left alone. Raises UserError when the
    target exists or cannot be written.
    """
    check_free(target)
    if buckets.is_on_bucket(target):
        with _new_on_bucket(target) as partial:
            yield partial
        return
    with none_left_empty(target.parent), _new_directory(target) as partial:
        yield partial


@contextlib.contextmanager
def _new_on_bucket(target: Path) -> Iterator[Path]:
    with buckets.explained(f"cannot write {target}"), temporary_directory() as directory:
        yield directory
        with _claimed_when_free(target):
            check_free(target)
            buckets.remove_unfinished(target)
            (target / buckets.UNFINISHED).write_bytes(b"")
            buckets.upload(directory, target)
            buckets.remove(target / buckets.UNFINISHED)


@contextlib.contextmanager
def _claimed_when_free(target: Path) -> Iterator[None]:
    """Hold the target once no other process is writing there: one that is may be killed before it
    finishes."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(claimed(target))
                break
            except BlockingIOError:
                time.sleep(WAIT)
        yield


@contextlib.contextmanager
def filled(directory: Path) -> Iterator[Path]:
    """Yield the directory, created if missing; for one in a bucket, a temporary directory whose
    files are uploaded at the end of the block, replacing those of the same names."""
    if not buckets.is_on_bucket(directory):
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with temporary_directory() as local:
        yield local
        buckets.upload(local, directory)


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial(target, lambda **at: Path(tempfile.mkdtemp(**at))) as partial:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for folder, _, files in os.walk(partial):
                for path in (folder, *(os.path.join(folder, file) for file in files)):
                    _fsync(path)
            check_free(target)
            partial.rename(target)
            _fsync(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a hidden file next to the target. At the end of the block it is renamed to the target,
    replacing an existing file; if the block fails, it is deleted. What killed processes left behind
    is removed. For a target in a bucket, yield a temporary file, which is uploaded. The name is
    unique: a process id would not suffice, as every run in a container is process 1."""
    if buckets.is_on_bucket(target):
        with temporary_directory() as directory:
            yield directory / target.name
            buckets.upload(directory, target.parent)
        return
    with _partial(target, _empty_file) as partial:
        partial.chmod(0o666 & ~_umask())
        yield partial
        partial.replace(target)


def require_renames(directory: Path, key: str) -> None:
    """Raise UserError where directories cannot be renamed, which is how complete ones get their
    names. A bucket named by its URL needs no renames."""
    if buckets.is_on_bucket(directory):
        return
    with tempfile.TemporaryDirectory(prefix=f".rename{PARTIAL}", dir=directory) as probe:
        before, after = Path(probe, "before"), Path(probe, "after")
        before.mkdir()
        (before / "file").touch()
        try:
            before.rename(after)
        except OSError as error:
            raise UserError(
                f"{key}: {directory} does not support renaming directories ({error.strerror});"
                " mount a bucket with a hierarchical namespace, or name it as gs://BUCKET/PATH"
            ) from error


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, completely or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises UserError when the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; delete it, or its directory") from error


def _empty_file(**at: Any) -> Path:
    handle, name = tempfile.mkstemp(**at)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def _partial(target: Path, make: Callable[..., Path]) -> Iterator[Path]:
    """Yield what `make` creates, locked while the block runs, and deleted after it."""
    sweep(target.parent, target.name)
    with contextlib.ExitStack() as held:
        while True:
            partial = make(prefix=f".{target.name}{PARTIAL}", dir=target.parent)
            _unfinished.add(partial)
            try:
                held.enter_context(locked(partial))
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took it for a leftover before it was locked
            except OSError:
                pass  # a file system without locks
            if partial.exists():
                break
        try:
            yield partial
        finally:
            remove(partial)
            _unfinished.discard(partial)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it exists."""
    if buckets.is_on_bucket(path):
        buckets.remove(path)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Yield a directory for temporary files, deleted after the block. Those left by killed
    processes are removed: each may contain a whole model."""
    target = Path(tempfile.gettempdir(), "btx_jax")
    with _partial(target, lambda **at: Path(tempfile.mkdtemp(**at))) as directory:
        yield directory


def abandon() -> None:
    """Delete what this process has not finished, even if other threads are still writing there."""
    for path in list(_unfinished):
        for _ in range(100):
            if not buckets.is_on_bucket(path) and path.is_dir():
                # Renamed, so that these threads no longer find it.
                gone = path.with_name(f"{path.name}-gone")
                with contextlib.suppress(OSError):
                    path.rename(gone)
                remove(gone)
            remove(path)
            if not path.exists():
                break


def sweep(directory: Path, name: str | None = None) -> None:
    """Delete the unfinished files and directories that killed processes left behind. name: of their
    target; None for all. Those of running processes are locked and left alone."""
    if buckets.is_on_bucket(directory):
        return  # nothing hidden is written there
    for left_over in directory.glob(f".{'*' if name is None else glob.escape(name)}{PARTIAL}*"):
        with contextlib.suppress(OSError), locked(left_over):
            remove(left_over)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs. Raises BlockingIOError, an OSError, when another process
    holds it: on this machine, or on any for a directory in a bucket. The lock ends with the
    process."""
    if buckets.is_on_bucket(path):
        with claimed(path):
            yield
        return
    handle = os.open(path, os.O_RDONLY)
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
