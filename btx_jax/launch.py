"""Run one config: python -m btx_jax.launch --config=configs/demo.py[:ARG] [--workdir=DIR]
[--config.SECTION.KEY=VALUE ...]

`btx run demo[:ARG] ...` does the same, without absl's flags. Every key of the config can be
overridden on the command line. An unfinished run of the same config in the directory is resumed; a
finished one is left as it is. Exit status: 0 finished, 1 --compile_topology does not fit, 2 invalid
input (one line says what is wrong and how to fix it), 130 and 143 ended by Ctrl-C and SIGTERM, in
training with the last complete step saved; a second signal ends it at once.
"""

from btx_jax import environment, interrupts
from btx_jax.command_line import fail, told_in_one_line

if __name__ == "__main__":  # the imports below take seconds, and some need the right jax
    interrupts.end_at_once("run the same command to resume from the last checkpoint")
    with told_in_one_line():
        environment.check()

import os
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's messages about the CPU

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from btx_jax.cli import runs
from btx_jax.cli.configs import split_overrides
from btx_jax.config.config_dict import from_config_dict
from btx_jax.errors import UserError
from btx_jax.parallel.accelerators import leave_absent_tpu
from btx_jax.presets.config_file import define_config, read_config

FLAGS = flags.FLAGS
try:
    _CONFIG = define_config(
        FLAGS, told="Config file or preset: configs/demo.py, configs/math_expert.py:tiny, btx:tiny."
    )
except flags.Error as error:  # from a --flagfile, which is read here
    fail(error)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for everything the run writes. Default: runs/NAME-OF-CONFIG."
)
_TOPOLOGY = flags.DEFINE_string(
    "compile_topology",
    None,
    "Compile the step for TPUs such as v5p:2x2x4, print its memory and time, and exit.",
)
_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "With --compile_topology: number of slices.", lower_bound=1
)
_ONLY = flags.DEFINE_string(
    "only",
    "",
    "Run only this stage of a pipeline, in WORKDIR/ONLY. The stages that it needs must have"
    " finished.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0. Default: JAX_COORDINATOR_ADDRESS, else as JAX detects.",
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "With --coordinator: number of processes. Default: JAX_NUM_PROCESSES."
)
_PROCESS = flags.DEFINE_integer(
    "process_id", -1, "With --coordinator: index of this process, from 0. Default: JAX_PROCESS_ID."
)


def parse(argv: list[str]) -> list[str]:
    """Parse absl's flags; wrong ones are reported in one line."""
    leave_absent_tpu()
    with told_in_one_line():
        try:
            return FLAGS(argv, known_only=False)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # config files may raise anything
            if file := _config_file(argv):
                read_config(file, split_overrides(argv)[1])  # raises for mistakes in either
            if not isinstance(error, flags.Error | UserError):
                raise
            raise UserError(error) from None


def _config_file(argv: list[str]) -> str:
    """The value of --config; "" for none."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch("--?config(?:=(.*))?", word, re.DOTALL):
            return following if match[1] is None else match[1]
    return ""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unknown argument {argv[1]!r}; overrides look like --config.train.steps=100")
    if not FLAGS["config"].present:
        fail("--config is missing; for example --config=demo (--help lists all flags)")
    file = str(config_flags.get_config_filename(FLAGS["config"]))
    runs.log_to_terminal()
    with told_in_one_line():
        if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
            read_config(file)  # raises: the file cannot be read, or returns something else
        config = from_config_dict(_CONFIG.value)
        workdir = _WORKDIR.value or ""
        if _TOPOLOGY.value:
            fits = runs.compiles(config, file, workdir, _TOPOLOGY.value, _SLICES.value)
            sys.exit(0 if fits else 1)
        runs.run(
            config,
            file,
            workdir,
            _ONLY.value,
            _COORDINATOR.value,
            _PROCESSES.value,
            _PROCESS.value,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
