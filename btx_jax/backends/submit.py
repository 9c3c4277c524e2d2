"""A pipeline with every stage as a job of its own, so that branches train at the same time and
apart.

Start it again after any interruption: what has finished is skipped, what runs is left alone.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from btx_jax.backends.cloud import MOUNT, Place, ask
from btx_jax.backends.gke import Gke
from btx_jax.backends.jobs import Backend, Job, drive, jobs_of
from btx_jax.backends.local import Local
from btx_jax.backends.queued_resources import QueuedResources
from btx_jax.backends.skypilot import SkyPilot
from btx_jax.paths import expand

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
    """At most `parallel` stages at a time, as processes. dry_run: write down what they would be,
    into files of the directory `out`, or on stdout. Raises UserError."""
    where = Path(expand(workdir, "--workdir")).resolve()
    jobs = jobs_of(pipeline, str(where), overrides, python=sys.executable)
    local = Local(where / "logs", parallel)
    if dry_run:
        _show(jobs, local.files, out)
        return
    local.run(jobs, lambda job: (where / job.name / "done.json").exists())
    command = tuple(word for word in jobs[0].command if not word.startswith("--only="))
    whole = Job("pipeline", (), command, str(where))
    local.run([whole], lambda job: False)  # all is there: writes the pipeline's own files


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
    """backend: of CLOUD. workdir: as the machines see it, "" for one named by the run. topologies:
    stage, or "" for all others -> TPU slice. Raises UserError."""
    engine = CLOUD[backend](place)
    workdir = workdir or f"{MOUNT}/runs/{place.run}"
    jobs = jobs_of(pipeline, workdir, overrides, topologies, cache=f"{MOUNT}/cache")
    if dry_run:
        _show(jobs, engine.files, out)
        return
    inside = place.bucket.rstrip("/") + workdir.removeprefix(MOUNT)
    drive(
        jobs,
        engine,
        lambda job: (
            ask(["gcloud", "storage", "ls", f"{inside}/{job.name}/done.json"]).returncode == 0
        ),
    )


def _show(jobs: list[Job], files: Callable[[Job], dict[str, str]], out: str) -> None:
    for job in jobs:
        for name, text in files(job).items():
            if out:
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / name).write_text(text, encoding="utf-8")
            else:
                print(f"# ---- {name}" + (f" (after {', '.join(job.needs)})" if job.needs else ""))
                print(text)
