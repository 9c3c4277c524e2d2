"""Goodput: how a run's wall time divides among activities, over all its starts."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from btx_jax.output import read_json, write_json

FILE = "goodput.json"
# step: training steps, including writing their metrics. lost: steps after the last checkpoint
# before a kill, which had to be repeated. compile: ahead-of-time compilation of the step. restore:
# placing the state on the devices, from a checkpoint or new. save: waiting for saves. data:
# preparing text, and batches that the device waited for. evaluate: held-out losses and test sets,
# including their compilation. other: everything else, such as the checks before a run.
ACTIVITIES = ("step", "lost", "compile", "restore", "save", "data", "evaluate", "other")


class Goodput:
    """Divides time since its construction among activities. Every moment belongs to one, so that
    the shares sum to 1. What a killed start did after its last written line is unknown and not
    counted, nor is the time between starts."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = "other", time.perf_counter()

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Within the block, time belongs to this activity, except in nested blocks."""
        outer = self._change(activity)
        try:
            yield
        finally:
            self._change(outer)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Reassign seconds that turn out to belong to another activity."""
        self._change(self._activity)
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def go_on(self, workdir: Path, lines: Sequence[Mapping[str, Any]], first: int) -> None:
        """Include the run's earlier starts. lines: all of metrics.jsonl, including those after step
        `first`, from which this start resumes: their time was lost."""
        told = [_of_line(line) for line in lines if "goodput" in line]
        file = workdir / FILE
        ledger = [read_json(file)] if file.exists() else []
        known = [*told, *ledger]
        before = max(known, key=lambda x: sum(x.values())) if known else {}
        for activity, seconds in before.items():
            self._seconds[activity] += seconds
        kept = [_of_line(x)["step"] for x in lines if "goodput" in x and x["step"] <= first]
        if kept or not first:
            useful = kept[-1] if kept else 0.0
            self.move("step", "lost", max(self._seconds["step"] - useful, 0.0))

    def keep(self, workdir: Path) -> None:
        """Save the totals for the next start."""
        self._change(self._activity)
        write_json(workdir / FILE, self._seconds)

    def told(self) -> dict[str, Any]:
        """{goodput: activity -> its share of wall_seconds, wall_seconds}, so far."""
        self._change(self._activity)
        total = sum(self._seconds.values())
        shares = {name: seconds / total for name, seconds in self._seconds.items()}
        return {"goodput": shares, "wall_seconds": total}

    def __str__(self) -> str:
        """The shares, largest first, except those below half a percent."""
        told = self.told()
        shares = sorted(told["goodput"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
        return f"{told['wall_seconds']:.0f} s of wall time: {parts}"

    def _change(self, activity: str) -> str:
        """Switch to an activity. Returns the previous one."""
        before, now = self._activity, time.perf_counter()
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before


def _of_line(line: Mapping[str, Any]) -> dict[str, float]:
    """Activity -> seconds, from a line written by `told`."""
    return {name: share * line["wall_seconds"] for name, share in line["goodput"].items()}
