"""What `btx run`, `btx compile` and btx_jax.launch share: running, compiling and planning a
config."""

import logging
import sys
from pathlib import Path

from btx_jax import stages, terminal
from btx_jax.config.config import Config
from btx_jax.errors import Mistakes, UserError
from btx_jax.output import write_json
from btx_jax.parallel import hosts
from btx_jax.paths import to_path
from btx_jax.rundir import PLAN


def log_to_terminal() -> None:
    terminal.log_to(sys.stderr, logging.INFO)
    for noisy in ("absl", "jax", "orbax", "grain", "etils", "wandb", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def default_workdir(named: str) -> Path:
    """The default workdir of a config: configs/math_expert.py:tiny -> runs/math_expert_tiny, and
    likewise for the preset math_expert:tiny. A path in the argument (`:tiny,A/B`) is left out."""
    path, _, argument = named.partition(":")
    words = ",".join(part for part in argument.split(",") if "/" not in part)
    return Path("runs") / "_".join(filter(None, (Path(path).stem, words)))


def _directory(workdir: str, named: str) -> Path:
    return (to_path(workdir, "--workdir") if workdir else default_workdir(named)).resolve()


def run(
    config: Config,
    named: str,
    workdir: str = "",
    only: str = "",
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
) -> None:
    """Run a config. named: the config's file or preset, as the user wrote it. workdir: "" for the
    default. Raises UserError."""
    where = _directory(workdir, named)
    hosts.start(coordinator, processes, process)
    if not hosts.is_first():
        logging.disable(logging.WARNING)  # only one process reports; errors come from all
    if only and config.stage != "pipeline":
        raise UserError(f"--only={only}: {named} is not a pipeline")
    stages.run(config, where, **({"only": only} if only else {}))
    if not only and (command := stages.next_command(config, where)):
        logging.info("next: %s", command)


def compiles(config: Config, named: str, workdir: str, topology: str, slices: int) -> bool:
    """Whether the training step of a config fits this many slices of a TPU topology. Logs what the
    step takes. Raises UserError."""
    from btx_jax.planning import compile_check

    return compile_check.run(config, _directory(workdir, named), topology, slices)


def plan(
    config: Config,
    named: str,
    workdir: str,
    topology: str,
    slices: int,
    price: float,
) -> None:
    """Print an estimate of what a pipeline takes on this many slices of a TPU topology, or on this
    machine if topology is "", and write it to WORKDIR/plan.json for the report. Raises
    UserError."""
    import jax

    from btx_jax.planning import compile_check, steps, tables
    from btx_jax.planning.plan import plan
    from btx_jax.reporting.summary import print_tables
    from btx_jax.stages.pipeline import find_mistakes, resolved_stages
    from btx_jax.training.storage import shortage

    where = _directory(workdir, named)
    if config.pipeline and not topology:  # a slice has other devices than this machine
        mistakes = Mistakes()
        find_mistakes(resolved_stages(config, where), where, mistakes)
        mistakes.tell()
    if topology:
        chips = len(compile_check.topology_devices(topology, slices))
        made = plan(config, where, steps.on_slice(topology, slices), chips)
    else:
        made = plan(config, where, steps.on_this_machine, jax.device_count())
    print_tables(tables.tables(made, price))
    needed = {where / stage.name: stage.storage for stage in made.stages}
    for warning in (*tables.warnings(made), shortage(needed, where)):
        if warning:
            terminal.warn(warning)
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / PLAN, {"on": topology or "this machine", **tables.as_json(made, price)})
    print(
        terminal.plain(f"wrote {where / PLAN}; the run's report compares it with the measurements")
    )
