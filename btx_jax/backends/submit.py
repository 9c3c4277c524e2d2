"""Run a pipeline with every stage as a separate job, so that branches train concurrently on
separate machines.

After any interruption it can be started again: finished stages are skipped, running ones are left
alone.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from btx_jax.backends.cloud import Place
from btx_jax.backends.gke import Gke
from btx_jax.backends.jobs import Backend, Job, drive, jobs_of
from btx_jax.backends.local import Local
from btx_jax.backends.queued_resources import QueuedResources
from btx_jax.backends.skypilot import SkyPilot
from btx_jax.buckets import is_on_bucket
from btx_jax.paths import to_path
from btx_jax.rundir import has_finished

CLOUD: Mapping[str, Callable[[Place], Backend]] = {
    "queued-resources": QueuedResources,
    "gke": Gke,
    "skypilot": SkyPilot,
}


def on_this_machine(
    pipeline: str,
    overrides: Sequence[str],
    workdir: str,
    parallel: int,
    dry_run: bool = False,
    out: str = "",
) -> None:
    """Run at most `parallel` stages at a time, as processes. dry_run: only write their commands to
    files in the directory `out`, or to stdout. Raises UserError."""
    where = to_path(workdir, "--workdir").resolve()
    jobs = jobs_of(pipeline, str(where), overrides, python=sys.executable)
    logs = Path("runs", where.name, "logs") if is_on_bucket(where) else where / "logs"
    local = Local(logs, parallel)
    if dry_run:
        _show(jobs, local.files, out)
        return
    local.run(jobs, lambda job: has_finished(where / job.name))
    command = tuple(word for word in jobs[0].command if not word.startswith("--only="))
    whole = Job("pipeline", (), command, str(where))
    local.run([whole], lambda job: False)  # all finished: write the pipeline's own files


def in_the_cloud(
    backend: str,
    place: Place,
    pipeline: str,
    overrides: Sequence[str],
    workdir: str = "",
    topologies: Mapping[str, str] | None = None,
    dry_run: bool = False,
    out: str = "",
) -> None:
    """Submit a pipeline to a cloud backend. backend: a key of CLOUD. workdir: as the machines see
    it, "" for a directory of the bucket named after the run. topologies: stage, or "" for all
    others -> TPU slice. Raises UserError."""
    engine = CLOUD[backend](place)
    workdir = workdir or place.path("runs", place.run)
    jobs = jobs_of(pipeline, workdir, overrides, topologies, cache=place.path("cache"))
    if dry_run:
        _show(jobs, engine.files, out)
        return
    home = to_path(workdir, "--workdir")
    drive(jobs, engine, lambda job: has_finished(home / job.name))


def _show(jobs: list[Job], files: Callable[[Job], dict[str, str]], out: str) -> None:
    for job in jobs:
        for name, text in files(job).items():
            if out:
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / name).write_text(text, encoding="utf-8")
            else:
                print(f"# ---- {name}" + (f" (after {', '.join(job.needs)})" if job.needs else ""))
                print(text)
