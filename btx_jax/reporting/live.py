"""The state of a pipeline or a run while it runs, read from its directory, and the page that shows
it. Nothing is written, and no process is contacted."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from btx_jax.reporting import plots
from btx_jax.reporting.goodput import ACTIVITIES
from btx_jax.reporting.metrics import parts, read_metrics
from btx_jax.reporting.summary import over_domains, probe_points, test_set_curves
from btx_jax.rundir import CONFIG, has_finished, recorded_config
from btx_jax.terminal import duration
from btx_jax.training.watch import BARRIER

FINISHED, RUNNING, WAITING, READY, SILENT = "finished", "running", "waiting", "ready", "silent"
SILENCE = 120.0  # seconds without output after which a stage is silent; compiling takes as long
RECENT = 20  # steps over which speed and loss are averaged


@dataclass(frozen=True)
class Stage:
    """State of a stage.

    status: finished, running, waiting (for `waits`, the last of its needs), ready to start, or
    silent (it has started, and has written nothing for `heard` seconds: killed, or in a long
    computation). step: of steps. rate: tokens per second. left: seconds. lines: of metrics.jsonl.
    """

    name: str
    kind: str
    status: str
    waits: tuple[str, ...] = ()
    step: int = 0
    steps: int = 0
    loss: float | None = None
    heldout: float | None = None
    rate: float | None = None
    left: float | None = None
    heard: float | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()


def stages(workdir: Path, now: float | None = None) -> list[Stage]:
    """The stages in a pipeline's directory, in the order listed; for a run's directory, that run
    only. Empty where nothing has started. now: in seconds since the epoch."""
    now = time.time() if now is None else now
    recorded = recorded_config(workdir)
    if "pipeline" not in recorded:
        if recorded:
            return [_stage(workdir.name, workdir, recorded, (), now)]
        # A pipeline run as jobs: each runs one stage, and none has the whole pipeline's config.
        found = sorted(path.parent for path in workdir.glob(f"*/{CONFIG}"))
        return [_stage(path.name, path, recorded_config(path), (), now) for path in found]
    pipeline = recorded["pipeline"]
    finished = {name for name in pipeline if has_finished(workdir / name)}
    waits = {
        name: [need for need in stage["needs"] if need not in finished]
        for name, stage in pipeline.items()
    }
    return [
        _stage(name, workdir / name, stage["config"], _last(waits[name], waits), now)
        for name, stage in pipeline.items()
    ]


def _last(names: Sequence[str], waits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Those of the names that none of the others waits for, directly or indirectly: once these have
    finished, all have."""
    behind: set[str] = set()
    left = [need for name in names for need in waits[name]]
    while left:
        if (need := left.pop()) not in behind:
            behind.add(need)
            left += waits[need]
    return tuple(name for name in names if name not in behind)


def _stage(
    name: str, path: Path, config: Mapping[str, Any], waits: tuple[str, ...], now: float
) -> Stage:
    files = [file for file in (*parts(path), path / CONFIG) if file.exists()]
    heard = max(0.0, now - max(file.stat().st_mtime for file in files)) if files else None
    if has_finished(path):
        status = FINISHED
    elif heard is not None:
        status = RUNNING if heard < SILENCE else SILENT
    else:
        status = WAITING if waits else READY
    lines = read_metrics(path)
    trained = [line for line in lines if "lm_loss" in line]
    measured = [line for line in lines if "heldout" in line]
    steps, step = (config.get("train") or {}).get("steps", 0), 0
    rate = left = None
    if trained:
        step = trained[-1]["step"]
        recent = trained[-RECENT:]
        speeds = [line["tokens_per_second"] for line in recent if line.get("tokens_per_second")]
        if speeds:
            rate = len(speeds) / sum(1 / speed for speed in speeds)
            left = (steps - step) * trained[-1]["tokens"] / rate
    return Stage(
        name,
        config["stage"],
        status,
        waits,
        step,
        steps,
        sum(line["lm_loss"] for line in trained[-RECENT:]) / len(trained[-RECENT:])
        if trained
        else None,
        over_domains(measured[-1]["heldout"]) if measured else None,
        rate,
        left,
        heard,
        trained[-1].get("goodput", {}) if trained else {},
        lines,
    )


class Page:
    """The page of one directory. Figures are drawn again only when their data have changed."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._drawn: tuple[object, dict[str, str]] = (None, {})
        self._drawing = threading.Lock()  # matplotlib draws one figure at a time
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("btx_jax.reporting", "."), autoescape=True
        )

    def whole(self, seconds: float) -> str:
        """HTML that periodically fetches `body`. seconds: the interval."""
        return self._templates.get_template("live.html.j2").render(
            title=self._workdir.name, seconds=seconds, body=self.body()
        )

    def body(self) -> str:
        found = stages(self._workdir)
        return self._templates.get_template("live_body.html.j2").render(
            stages=found,
            figures=self._figures(found),
            activities=ACTIVITIES,
            limit=BARRIER,
            duration=duration,
            finished=sum(stage.status == FINISHED for stage in found),
            has_report=self.report.exists(),
        )

    @property
    def report(self) -> Path:
        return self._workdir / "report.html"

    def _figures(self, found: Sequence[Stage]) -> dict[str, str]:
        lengths = tuple((stage.name, len(stage.lines)) for stage in found)
        with self._drawing:
            if lengths != self._drawn[0]:
                self._drawn = lengths, dict(_figures(found))
            return self._drawn[1]


def _figures(found: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    curves = {stage.name: stage.lines for stage in found if stage.lines}
    yield "Training loss", plots.loss_curves(curves)
    yield "Held-out loss, mean over domains", plots.heldout_curves(curves)
    probes = {name: probe_points(lines) for name, lines in curves.items()}
    yield "Mixing probe", plots.mixing_probes({k: v for k, v in probes.items() if v})
    tried = {name: test_set_curves(lines) for name, lines in curves.items()}
    yield "Test sets", plots.test_set_curves({k: v for k, v in tried.items() if v})
    loads = {
        name: lines[-1]["routing"]["load"]
        for name, all_lines in curves.items()
        if (lines := [line for line in all_lines if line.get("routing", {}).get("load")])
    }
    for name, load in loads.items():
        experts = [f"expert {i}" for i in range(len(load[0]))]
        yield f"Routing load of {name}, last step", plots.routing_maps({"all text": load}, experts)
