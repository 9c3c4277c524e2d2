"""What a run says about itself while it runs: metrics.jsonl, TensorBoard, trackers."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btx_jax.output import new_file
from btx_jax.reporting.trackers import Trackers

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
ASIDE = "metrics.damaged.jsonl"


class MetricsWriter:
    """Appends one JSON object a line to WORKDIR/metrics.jsonl and the numbers among them to
    WORKDIR/tensorboard and to the trackers, which the caller opens and closes.

    A resumed run starts at `first_step`: lines of later steps, written after the checkpoint it
    resumes from, are removed; one that is damaged is set aside in metrics.damaged.jsonl. With
    `enabled` False (every process but the first) nothing is
    written.
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
        path = workdir / FILE
        if path.exists():
            lines, bad = _parse(path)
            if trackers:
                trackers.begin((line["step"], numbers(line)) for line in lines)
            kept = [line for line in lines if line["step"] <= first_step]
            if bad:
                _set_aside(workdir / ASIDE, bad)
            with new_file(path) as partial:
                partial.write_text(
                    "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
                )
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        told = numbers(values)
        for name, value in told.items():
            self._board.add_scalar(name, value, step)
        if self._trackers:
            self._trackers.write(step, told)

    def sync(self) -> None:
        """Nothing written so far is lost to a kill, in a mounted bucket either, which takes a file
        when it is synced or closed."""
        if self._enabled:
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; damaged ones, and a last one cut short by a kill, are left
    out."""
    return _parse(path)[0]


def bad_lines(path: Path) -> list[int]:
    """The numbers, from 1, of damaged lines."""
    return list(_parse(path)[1])


def _parse(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """(lines, number -> damaged line). A last line without its end is neither: a kill cut it."""
    lines, bad = [], {}
    *whole, _ = path.read_bytes().split(b"\n")
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
    with path.open("ab") as file:
        file.writelines(text + b"\n" for text in bad.values())
    numbers = ", ".join(map(str, list(bad)[:5]))
    log.warning(
        "%s: damaged lines (%s) are set aside in %s; the others are kept", FILE, numbers, path
    )


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Those of a line but its step, by `a/b/0`-style names: what curves and trackers show."""
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
