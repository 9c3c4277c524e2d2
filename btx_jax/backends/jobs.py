"""A pipeline as jobs: one command per stage, each on its own machines, finished once its done.json
exists.

No state is kept here: which jobs have finished is read from the working directory, on a disk or in
a bucket that all jobs share. A submitter that was killed can be restarted and resumes from there.
"""

import graphlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from btx_jax.config.config import Config
from btx_jax.errors import ConfigError, UserError
from btx_jax.parallel.topologies import parse_grid
from btx_jax.presets.config_file import read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A stage of a pipeline as a job. name: the stage, which runs in WORKDIR/NAME. needs: stages
    that must finish first. command: what its machines run. topology: its slice, such as v5p:2x2x4;
    "" for machines without TPUs."""

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    workdir: str
    topology: str = ""


class Backend(Protocol):
    """Where jobs run. An existing engine does the work; a backend only writes its requests."""

    def files(self, job: Job) -> dict[str, str]:
        """File name -> contents: everything that would be sent to the engine."""
        ...

    def submit(self, job: Job) -> None:
        """Submit the job to the engine. Submitting it twice starts it once. Raises UserError, with
        the engine's message, when the engine refuses."""
        ...

    def keep(self, job: Job) -> None:
        """Called periodically while a submitted job is unfinished: restore preempted machines, if
        the engine does not."""
        ...


def load_pipeline(file: str, overrides: Sequence[str] = ()) -> Config:
    """The pipeline config of a config file or preset. Raises ConfigError when it is not a pipeline,
    and with everything that is wrong with it."""
    config = read_config(file, overrides, "--pipeline")
    if config.pipeline is None:
        raise ConfigError(
            f"--pipeline={file}: its stage is {config.stage!r}, not 'pipeline'; run it with btx run"
        )
    return config


def jobs_of(
    file: str,
    workdir: str,
    overrides: Sequence[str] = (),
    topologies: Mapping[str, str] | None = None,
    python: str = "python",
    cache: str = "",
) -> list[Job]:
    """One job per stage, each after those it needs. topologies: stage, or "" for all others ->
    topology. cache: directory of tokenised text for all stages, "" for the one in their configs.
    Raises ConfigError for a topology of an unknown stage."""
    pipeline = load_pipeline(file, overrides).pipeline
    assert pipeline
    topologies = topologies or {}
    if unknown := sorted(set(topologies) - {"", *pipeline}):
        raise ConfigError(f"--slice={unknown[0]}=...: no such stage; known: {', '.join(pipeline)}")
    if cache:
        caches = (
            f"--config.pipeline.{name}.config.data.cache={cache}"
            for name, stage in pipeline.items()
            if stage.config.data
        )
        overrides = (*caches, *overrides)
    launch = (python, "-m", "btx_jax.launch", f"--config={file}", f"--workdir={workdir}")
    try:
        order = list(
            graphlib.TopologicalSorter(
                {name: stage.needs for name, stage in pipeline.items()}
            ).static_order()
        )
    except graphlib.CycleError as error:
        raise ConfigError(
            f"--pipeline={file}: stages depend on each other in a cycle: {', '.join(error.args[1])}"
        ) from None
    return [
        Job(
            name,
            pipeline[name].needs,
            (*launch, *overrides, f"--only={name}"),
            workdir,
            topologies.get(name, topologies.get("", "")),
        )
        for name in order
    ]


def in_waves(jobs: Iterable[Job], finished: set[str]) -> list[Job]:
    """The unfinished jobs whose needs have all finished."""
    return [job for job in jobs if job.name not in finished and set(job.needs) <= finished]


def drive(
    jobs: Sequence[Job],
    backend: Backend,
    is_finished: Callable[[Job], bool],
    poll_seconds: float = 60.0,
) -> None:
    """Submit every job once its needs have finished, until all jobs have. A job that fails blocks
    only those that need it; its engine retries it."""
    submitted: set[str] = set()
    while True:
        finished = {job.name for job in jobs if is_finished(job)}
        for job in in_waves(jobs, finished):
            if job.name not in submitted:
                backend.submit(job)
                submitted.add(job.name)
                log.info("submitted %s (%d of %d finished)", job.name, len(finished), len(jobs))
            else:
                backend.keep(job)
        if len(finished) == len(jobs):
            return
        time.sleep(poll_seconds)


@dataclass(frozen=True)
class Slice:
    """v5p:2x2x4 -> kind v5p, grid 2x2x4, 16 chips on 4 hosts."""

    kind: str
    grid: str
    chips: int
    hosts: int


KINDS = ("v4", "v5e", "v5p", "v6e")
CHIPS_PER_HOST = 4


def parse_topology(topology: str) -> Slice:
    """Parse a slice. Raises UserError for one that does not exist, or that the backends do not
    offer."""
    kind, sides = parse_grid(topology)
    if kind not in KINDS:
        raise UserError(
            f"--slice: {topology!r}: no backend supports {kind}; use {', '.join(KINDS)}"
        )
    chips = math.prod(sides)
    grid = topology.partition(":")[2]
    return Slice(kind, grid, chips, -(-chips // CHIPS_PER_HOST))
