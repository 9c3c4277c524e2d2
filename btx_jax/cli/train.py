"""Commands that run a config or estimate what it takes."""

import sys

import rich_click as click

from btx_jax import interrupts
from btx_jax.cli.configs import CONFIG, CONFIG_TOLD, TellsPresets, WithOverrides
from btx_jax.cli.parts import NOT_NEGATIVE, TRAIN, WHERE, command, text

CLUSTER = "Several processes"
WORKDIR = text(
    "--workdir",
    type=WHERE,
    metavar="DIR",
    help="directory of everything the run writes; by default runs/NAME-OF-CONFIG",
)


@command(
    cls=TellsPresets,
    panel=TRAIN,
    no_args_is_help=True,
    examples="""
btx run demo
btx run seed:tiny
btx run math_expert:tiny --config.init=runs/seed_tiny
btx run my.py:large --workdir=runs/mine
btx run btx:from_init,org/name --workdir=runs/mine
btx run btx:tiny --only=expert_math
""",
)
@click.argument("config", type=CONFIG, help=CONFIG_TOLD)
@WORKDIR
@text(
    "--only",
    metavar="STAGE",
    help="run only this stage of a pipeline, in DIR/STAGE; the stages that it needs must have"
    " finished",
)
@text(
    "--coordinator",
    panel=CLUSTER,
    metavar="HOST:PORT",
    help="address of process 0; by default $JAX_COORDINATOR_ADDRESS, else as JAX detects",
)
@click.option(
    "--num-processes",
    panel=CLUSTER,
    type=click.IntRange(min=1),
    metavar="N",
    help="number of processes; by default $JAX_NUM_PROCESSES",
)
@click.option(
    "--process-id",
    panel=CLUSTER,
    type=click.IntRange(min=0),
    metavar="N",
    help="index of this process, from 0; by default $JAX_PROCESS_ID",
)
def run(
    config: str,
    overrides: list[str],
    workdir: str,
    only: str,
    coordinator: str,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Run a config: train, mix, evaluate, or a whole pipeline.

    Every key of the config can be set on the command line. An unfinished run of the same config in
    the directory is resumed; a finished one is left as it is. Ctrl-C and SIGTERM save the last
    complete step and end the run; a second signal ends it at once.
    """
    interrupts.end_at_once("run the same command to resume from the last checkpoint")
    from btx_jax.cli import runs
    from btx_jax.presets.config_file import read_config

    runs.log_to_terminal()
    runs.run(
        read_config(config, overrides, "CONFIG"),
        config,
        workdir,
        only,
        coordinator,
        num_processes or 0,
        -1 if process_id is None else process_id,
    )


@command(
    cls=WithOverrides,
    panel=TRAIN,
    no_args_is_help=True,
    examples="""
btx plan my_btx.py
btx plan my_btx.py --slice=v5p:2x2x2 --price=4.2
btx plan demo
""",
)
@click.argument("config", type=CONFIG, help=CONFIG_TOLD)
@text(
    "--slice",
    "topology",
    metavar="KIND:GRID",
    help="TPU slice for every stage, such as v5p:2x2x2; by default this machine",
)
@click.option(
    "--num-slices", type=click.IntRange(min=1), metavar="N", default=1, help="number of slices"
)
@click.option("--price", type=NOT_NEGATIVE, metavar="P", default=0.0, help="price of one chip-hour")
@WORKDIR
def plan(
    config: str,
    overrides: list[str],
    topology: str,
    num_slices: int,
    price: float,
    workdir: str,
) -> None:
    """Estimate what a pipeline takes before training any of it.

    Prints tokens, epochs, FLOPs, memory, time, storage and cost, and the same for dense training on
    as many tokens. A few steps of each kind are timed on this machine with random parameters; with
    --slice they are instead compiled for that TPU slice (minutes each; needs pip install
    'btx_jax[tpu]'), and their time is estimated from the compiled program. The plan is also written
    to DIR/plan.json, and appears in the run's report.
    """
    from btx_jax.cli import runs
    from btx_jax.presets.config_file import read_config

    runs.log_to_terminal()
    made = read_config(config, overrides, "CONFIG")
    runs.plan(made, config, workdir, topology, num_slices, price)


@command(
    "compile",
    cls=WithOverrides,
    panel=TRAIN,
    examples="""
btx compile moe_finetune v5p:2x2x4
btx compile math_expert v6e:8x8 --num-slices=2 --config.mesh.fsdp=64
""",
)
@click.argument("config", type=CONFIG, help=CONFIG_TOLD)
@click.argument("topology", help="a TPU slice: v5p:2x2x4, v5e:4x4, v6e:8x8, tpu7x:2x2x1")
@click.option(
    "--num-slices", type=click.IntRange(min=1), metavar="N", default=1, help="number of slices"
)
@WORKDIR
def compile_step(
    config: str, overrides: list[str], topology: str, num_slices: int, workdir: str
) -> None:
    """Compile a training step for TPUs without having one; report memory, FLOPs, traffic, time.

    Needs libtpu (pip install 'btx_jax[tpu]'). If the step does not fit, exits with status 1 and
    suggests the cheapest change that helps.
    """
    from btx_jax.cli import runs
    from btx_jax.presets.config_file import read_config

    runs.log_to_terminal()
    made = read_config(config, overrides, "CONFIG")
    sys.exit(0 if runs.compiles(made, config, workdir, topology, num_slices) else 1)
