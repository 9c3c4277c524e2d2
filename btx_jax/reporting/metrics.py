"""Metrics of a running run: metrics.jsonl, TensorBoard, trackers.

A bucket stores only whole objects. For a run in a bucket, both files are written on the local disk
and uploaded periodically, and at every point after which nothing may be lost. A large metrics.jsonl
is continued in metrics.0001.jsonl and so on, and TensorBoard's file in another one, so that earlier
parts are not sent again.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btx_jax import buckets
from btx_jax.output import new_file, remove, temporary_directory
from btx_jax.reporting.trackers import Trackers

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
ASIDE = "metrics.damaged.jsonl"
BOARD = "tensorboard"
_PART = re.compile(r"metrics(\.\d{4})?\.jsonl")
PART_BYTES = 2**22  # size of a file in a bucket after which a new part is started
UPLOADED = 30.0  # seconds between uploads to a bucket


class MetricsWriter:
    """Appends one JSON object per line to WORKDIR/metrics.jsonl, and its numbers to
    WORKDIR/tensorboard and to the trackers, which the caller opens and closes.

    A resumed run starts at `first_step`: lines of later steps, written after the checkpoint from
    which it resumes, are removed; a damaged line is moved to metrics.damaged.jsonl. If not
    `enabled` (in every process but the first), nothing is written.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        enabled: bool = True,
        trackers: Trackers | None = None,
    ):
        self._enabled, self._trackers = enabled, trackers
        if not enabled:
            return
        self._files = _OnBucket(workdir) if buckets.is_on_bucket(workdir) else _OnDisk(workdir)
        kept = None
        if parts(workdir):
            lines, bad = _parse(workdir)
            if trackers:
                trackers.begin((line["step"], numbers(line)) for line in lines)
            kept = [line for line in lines if line["step"] <= first_step]
            if bad:
                _set_aside(workdir / ASIDE, bad)
        self._files.open(kept, first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        told = numbers(values)
        self._files.write({"step": step, **values}, told)
        if self._trackers:
            self._trackers.write(step, told)

    def sync(self) -> None:
        """Ensure that a kill loses nothing written so far, even on a bucket, mounted or not."""
        if self._enabled:
            self._files.sync()

    def close(self) -> None:
        if self._enabled:
            self._files.close()


class _OnDisk:
    """A run's files in its directory."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def open(self, kept: Sequence[Mapping[str, Any]] | None, first_step: int) -> None:
        """kept: the lines to keep; None if there is no file yet."""
        path = self._workdir / FILE
        if kept is not None:
            with new_file(path) as partial:
                partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._first = first_step
        self._is_mounted = buckets.is_mounted(self._workdir)
        self._open()

    def _open(self) -> None:
        path = self._workdir / FILE
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(
            str(self._workdir / BOARD),
            purge_step=self._first + 1,
            filename_suffix=f".{self._first}",  # distinguishes files within the same second
        )

    def write(self, line: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        self._file.write(_line(line))
        _add(self._board, line["step"], numbers)
        self._first = line["step"]

    def sync(self) -> None:
        if self._is_mounted:  # a mounted bucket keeps only closed files
            self.close()
            self._open()
            return
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


class _OnBucket:
    """A run's files in parts: the last part of each kind is written locally and uploaded, replacing
    the bucket's copy."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._held = contextlib.ExitStack()
        self._local = self._held.enter_context(temporary_directory())
        self._text: list[str] = []  # lines of the current part
        self._size, self._number = 0, 0
        self._uploaded = time.monotonic()

    def open(self, kept: Sequence[Mapping[str, Any]] | None, first_step: int) -> None:
        """kept: the lines to keep; None if there is no file yet."""
        self._start = first_step + 1
        self._open_board()
        stale = set(parts(self._workdir))
        for line in kept or ():
            self._append(line)
        self._send_part()
        for path in stale - {self._part(number) for number in range(self._number + 1)}:
            buckets.remove(path)

    def write(self, line: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        self._append(line)
        _add(self._board, line["step"], numbers)
        if time.monotonic() - self._uploaded > UPLOADED:
            self.sync()

    def sync(self) -> None:
        try:
            self._send()
        except Exception as error:  # any error of a bucket; the next upload includes this one
            log.warning("%s: metrics are waiting to be uploaded: %s", self._workdir, error)

    def close(self) -> None:
        with self._held:
            self._send()
            self._board.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._size > PART_BYTES:
            self._send_part()
            self._text, self._size, self._number = [], 0, self._number + 1
        self._text.append(_line(line))
        self._size += len(self._text[-1])

    def _part(self, number: int) -> Path:
        return self._workdir / (f"metrics.{number:04}.jsonl" if number else FILE)

    def _send_part(self) -> None:
        if self._text:
            self._part(self._number).write_text("".join(self._text), encoding="utf-8")

    def _send(self) -> None:
        self._uploaded = time.monotonic()
        self._send_part()
        self._board.flush()
        buckets.upload(self._local / BOARD, self._workdir / BOARD)
        if sum(file.stat().st_size for file in (self._local / BOARD).iterdir()) > PART_BYTES:
            self._board.close()
            buckets.upload(self._local / BOARD, self._workdir / BOARD)
            remove(self._local / BOARD)
            self._open_board()

    def _open_board(self) -> None:
        suffix = f".{secrets.token_hex(4)}"  # names are otherwise unique only by host and second
        self._board = SummaryWriter(
            str(self._local / BOARD), purge_step=self._start, filename_suffix=suffix
        )


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _add(board: SummaryWriter, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        board.add_scalar(name, value, step)


def parts(workdir: Path) -> list[Path]:
    """The files of a run's metrics, in order; a single one on a disk."""
    return sorted(
        (file for file in workdir.glob("metrics*.jsonl") if _PART.fullmatch(file.name)),
        key=lambda file: (len(file.name), file.name),
    )


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines that a run wrote, except damaged ones and a last one truncated by a kill."""
    return _parse(workdir)[0]


def bad_lines(workdir: Path) -> list[int]:
    """Line numbers, from 1, of damaged lines."""
    return list(_parse(workdir)[1])


def _parse(workdir: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """(lines, number -> damaged line). An incomplete last line is neither: a kill truncated it."""
    lines, bad = [], {}
    *whole, _ = b"".join(file.read_bytes() for file in parts(workdir)).split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError("step")
            lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            bad[number] = text
    return lines, bad


def _set_aside(path: Path, bad: Mapping[int, bytes]) -> None:
    before = path.read_bytes() if path.exists() else b""
    with new_file(path) as partial:
        partial.write_bytes(before + b"".join(text + b"\n" for text in bad.values()))
    numbers = ", ".join(map(str, list(bad)[:5]))
    log.warning("%s: moved damaged lines (%s) to %s; the others are kept", FILE, numbers, path)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line except its step, by names such as `a/b/0`, for curves and trackers."""
    return dict(_scalars({key: value for key, value in line.items() if key != "step"}))


def _scalars(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _scalars(value, f"{name}/{key}" if name else key)
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _scalars(value, f"{name}/{i}")
    elif isinstance(values, int | float):
        yield name, values
