"""What a run says about itself while it runs: metrics.jsonl, TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btx_jax.output import new_file

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line to WORKDIR/metrics.jsonl and the numbers among them to
    WORKDIR/tensorboard.

    A resumed run starts at `first_step`: lines of later steps, written after the checkpoint it
    resumes from, are removed. With `enabled` False (every process but the first) nothing is
    written.
    """

    def __init__(self, workdir: Path, first_step: int, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        path = workdir / FILE
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= first_step]
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
        for name, value in _scalars(values):
            self._board.add_scalar(name, value, step)

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
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _scalars(values: Any, name: str = ""):
    """Leaves of nested dicts and lists as `a/b/layer_0`-style names."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _scalars(value, f"{name}/{key}" if name else key)
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _scalars(value, f"{name}/{i}")
    elif isinstance(values, int | float):
        yield name, values
