"""Tokenise a source's rows on all cores of all processes of a run.

One reader splits the rows into shards of about a mebibyte of text; the split does not depend on
where the shards are tokenised, or by how many processes. A source of a few shards is tokenised
where it is read. For a larger one, every finished shard is stored in a file, so that an interrupted
preparation resumes after the last of them, and several hosts can share the work.
"""

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from btx_jax.buckets import is_on_bucket
from btx_jax.config.config import DataConfig
from btx_jax.data.documents import Columns
from btx_jax.data.files import Row
from btx_jax.data.sources import Source
from btx_jax.data.tokenise_worker import receive, send
from btx_jax.data.tokenised import Counts, Tokenised, Tokeniser, load_columns, load_counts
from btx_jax.data.tokenizers import Tokenizer
from btx_jax.errors import UserError
from btx_jax.output import remove

SHARD_CHARACTERS, SHARD_ROWS = 2**20, 4096  # approximate size of a shard
FEW = 8  # shards that are tokenised faster than workers start
SILENCE = 60.0  # seconds after which missing shards of other hosts are made here
FOLDER = "tokenised"  # directory in the cache
STALE = 7 * 86_400  # seconds after which the shards of killed preparations are removed

log = logging.getLogger(__name__)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shards_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows into shards. The grouping depends only on the rows."""
    shard: list[Row] = []
    size = 0
    for row in rows:
        shard.append(row)
        size += _characters(row.value)
        if size >= SHARD_CHARACTERS or len(shard) == SHARD_ROWS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


class WorkerEnded(UserError):
    """A worker was killed; what has been tokenised so far is kept."""


class Shards:
    """A context manager that tokenises a source's rows while its block runs.

    read: returns the rows anew at each call. folder: directory of the finished shards of a large
    source, which the caller deletes (`discard`). host: (index of this host, number of hosts that
    share the work). Each makes its own shards; the first also makes those that other hosts fail to
    deliver.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        config: DataConfig,
        read: Callable[[], Iterable[Row]],
        folder: Path,
        host: tuple[int, int] = (0, 1),
    ):
        self._job, self._read, self._folder = (source, tokenizer, config), read, folder
        self._host, self._host_count = host
        self._few: list[list[Row]] | None = None
        self._made: dict[int, Tokenised] = {}  # for a small source
        self._counts: dict[int, Counts] = {}
        self._failed: dict[int, BaseException] = {}
        self._end: int | None = None  # the number of shards
        self._changed = threading.Condition()
        self._stopped = False
        self._reader: threading.Thread | None = None
        self._workers: list[subprocess.Popen[bytes]] = []
        self._of_thread = threading.local()
        self._room = threading.Semaphore(2 * cores())

    def __enter__(self) -> "Shards":
        shards = shards_of(self._read())
        first = list(itertools.islice(shards, FEW + 1))
        if len(first) <= FEW:
            self._few, self._tokenise = first, Tokeniser(*self._job)
            return self
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        shards = itertools.chain(first, shards)
        self._reader = threading.Thread(target=self._run, args=(shards,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for worker in self._workers:
            worker.kill()
        if self._reader:
            self._reader.join()
        for worker in self._workers:
            worker.communicate()

    def each(self, split: str) -> Iterator[tuple[Counts, Columns]]:
        """Yield shards in the order of the rows, as soon as each is finished. Raises UserError
        where the source cannot be read or tokenised."""
        for number in itertools.count():
            if not self._wait(number):
                return
            if self._few is not None:
                yield self._made[number].counts, self._made[number].columns[split]
            else:
                yield self._counts[number], load_columns(self._file(number), split)

    def finish_own(self) -> None:
        """Wait until this host's shards are made."""
        if self._reader:
            self._reader.join()

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06}.npz"

    def _is_own(self, number: int) -> bool:
        return number % self._host_count == self._host

    def _wait(self, number: int) -> bool:
        """Wait until a shard is finished; False when there is no shard of that number."""
        if self._few is not None:
            if number < len(self._few) and number not in self._made:
                self._made[number] = self._tokenise(self._few[number])
            return number < len(self._few)
        with self._changed:
            while True:
                if number in self._failed:
                    raise self._failed[number]
                if number in self._counts:
                    return True
                if self._end is not None and number >= self._end:
                    return False
                if self._failed and not (self._reader and self._reader.is_alive()):
                    raise self._failed[min(self._failed)]  # nothing will make this shard any more
                if self._is_own(number):
                    self._changed.wait(1.0)
                elif (found := load_counts(self._file(number))) is not None:
                    self._counts[number] = found
                else:
                    self._changed.wait(0.2)

    def _note(self, number: int, result: Counts | BaseException) -> None:
        with self._changed:
            if isinstance(result, Counts):
                self._counts[number] = result
            else:
                self._failed[number] = result
            self._changed.notify_all()

    def _run(self, shards: Iterable[list[Row]]) -> None:
        """Body of the reader's thread: make this host's shards, then missing ones of other
        hosts."""
        with ThreadPoolExecutor(cores()) as pool:
            end = self._submit(pool, shards, self._is_own)
            with self._changed:
                self._end = end
                self._changed.notify_all()
        if end is not None and self._host == 0 and (missing := self._still_missing(end)):
            log.warning("other hosts are not responding; tokenising their share here")
            with ThreadPoolExecutor(cores()) as pool:
                self._submit(pool, shards_of(self._read()), missing.__contains__)

    def _submit(
        self, pool: Executor, shards: Iterable[list[Row]], is_wanted: Callable[[int], bool]
    ) -> int | None:
        """Submit shards to the pool. Returns their number; None when they cannot be read or the
        caller has left."""
        number = 0
        try:
            for rows in shards:
                if self._stopped:
                    return None
                if is_wanted(number):
                    if (found := load_counts(self._file(number))) is not None:
                        self._note(number, found)
                    else:
                        self._room.acquire()
                        pool.submit(self._make, number, rows)
                number += 1
        except BaseException as error:
            self._note(number, error)
            return None
        return number

    def _still_missing(self, end: int) -> set[int]:
        """Wait for the other hosts' shards. Returns those still missing after SILENCE seconds in
        which none has arrived."""
        missing, since = {n for n in range(end) if not self._is_own(n)}, time.monotonic()
        while missing and not self._stopped:
            made = {number for number in missing if self._file(number).exists()}
            if made:
                missing, since = missing - made, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                return missing
            time.sleep(0.2)
        return set()

    def _make(self, number: int, rows: list[Row]) -> None:
        try:
            if self._stopped:
                return
            worker = self._worker()
            assert worker.stdin and worker.stdout
            try:
                send(worker.stdin, (self._file(number), rows))
                answer = receive(worker.stdout)
            except (EOFError, OSError):
                worker.kill()
                answer = WorkerEnded(
                    f"a tokenising process ended with status {worker.wait()}; if memory ran"
                    " out, run the same command with fewer cores (taskset)"
                )
            if isinstance(answer, OSError):
                answer = UserError(f"cannot write {self._folder}: {answer.strerror or answer}")
            self._note(number, answer)
        except BaseException as error:
            self._note(number, error)
        finally:
            self._room.release()

    def _worker(self) -> subprocess.Popen[bytes]:
        """The worker process of this thread."""
        if not hasattr(self._of_thread, "worker"):
            root = str(Path(__file__).parent.parent.parent)
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "btx_jax.data.tokenise_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is handled by this process
            )
            self._workers.append(worker)
            assert worker.stdin
            send(worker.stdin, self._job)
            self._of_thread.worker = worker
        return self._of_thread.worker


def discard(folder: Path) -> None:
    """Delete the shards of a source, and the directory of all sources' shards if it is then
    empty."""
    if not folder.exists():
        return
    remove(folder)
    if not is_on_bucket(folder):
        with contextlib.suppress(OSError):  # others remain
            folder.parent.rmdir()


def _changed(folder: Path) -> float:
    """Time of a directory's last change, in seconds since the epoch."""
    if is_on_bucket(folder):  # where directories have no times
        return max((file.stat().st_mtime for file in folder.glob("*")), default=time.time())
    return folder.stat().st_mtime


def sweep_stale(cache: Path) -> None:
    """Delete shards of preparations that were killed long ago and never resumed."""
    for folder in (cache / FOLDER).glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - _changed(folder) > STALE:
                discard(folder)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
