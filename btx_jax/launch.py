"""Run one config: python -m btx_jax.launch --config=configs/demo.py[:ARG] [--workdir=DIR]
[--config.SECTION.KEY=VALUE ...]

Every key of the config can be overridden on the command line. A directory that holds an unfinished
run of the same config is resumed; a finished one is left as it is. Exit status: 0 finished, 1
--compile_topology does not fit, 2 wrong input (one line says what and how to mend it), 143 ended by
SIGTERM with its step saved.
"""

import logging
import os
import re
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes about the CPU it compiles for

from absl import app, flags
from ml_collections import config_flags

from btx_jax import stages
from btx_jax.config_dict import from_config_dict
from btx_jax.errors import UserError
from btx_jax.parallel import hosts
from btx_jax.paths import expand

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/demo.py or configs/math_expert.py:tiny."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps everything it writes. Default: runs/NAME-OF-CONFIG."
)
_TOPOLOGY = flags.DEFINE_string(
    "compile_topology",
    None,
    "Compile the step for TPUs such as v5p:2x2x4, tell what it takes, and stop.",
)
_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "With --compile_topology: this many slices of it.", lower_bound=1
)
_ONLY = flags.DEFINE_string(
    "only",
    "",
    "Of a pipeline: run this stage alone, in WORKDIR/ONLY. What it needs must have finished.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0. Default: JAX_COORDINATOR_ADDRESS, else what JAX detects.",
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "With --coordinator: how many processes. Default: JAX_NUM_PROCESSES."
)
_PROCESS = flags.DEFINE_integer(
    "process_id", -1, "With --coordinator: which one this is, from 0. Default: JAX_PROCESS_ID."
)


def default_workdir(config_file: str) -> Path:
    """configs/math_expert.py:tiny -> runs/math_expert_tiny, and the same for `:tiny,A/B`: a path is
    no part of the name."""
    path, _, argument = config_file.partition(":")
    named = ",".join(part for part in argument.split(",") if "/" not in part)
    return Path("runs") / "_".join(filter(None, (Path(path).stem, named)))


def fail(message: object) -> None:
    """One line to stderr, exit status 2."""
    print(f"btx_jax: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """absl's flags, with wrong ones told in one line."""
    try:
        return FLAGS(argv, known_only=False)
    except (flags.Error, UserError) as error:
        fail(str(error).replace("flag --config=", "--config=", 1))
    except FileNotFoundError as error:
        fail(f"--config: no file {error.filename}")
    except (
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # how ml_collections reports a wrong override
        told = str(error.args[0] if error.args else error)
        words = re.findall(r"[A-Za-z_]+", told)
        keys = [
            argument.partition("=")[0].removeprefix("--")
            for argument in argv
            if argument.startswith("--config.")
        ]
        if not keys:
            raise  # a mistake in the config file itself: its author wants the traceback
        wrong = next((key for word in words for key in keys if word in key.split(".")), "--config")
        hint = re.search(r"Did you mean .*\?", told)
        fail(
            f"{wrong}: unknown key; {hint[0] if hint else 'this config has no such section or key'}"
        )
    return argv


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unknown argument {argv[1]!r}; overrides look like --config.train.steps=100")
    if not FLAGS["config"].present:
        fail("--config is missing; for example --config=configs/demo.py (--help lists all flags)")
    file = str(config_flags.get_config_filename(FLAGS["config"]))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "jax", "orbax", "grain", "etils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not Path(file.partition(":")[0]).is_file():
        fail(f"--config: no file {file.partition(':')[0]}")
    try:
        config = from_config_dict(_CONFIG.value)
        workdir = (
            Path(expand(_WORKDIR.value, "--workdir")) if _WORKDIR.value else default_workdir(file)
        ).resolve()
        if _TOPOLOGY.value:
            from btx_jax.stages import compile_check

            sys.exit(0 if compile_check.run(config, workdir, _TOPOLOGY.value, _SLICES.value) else 1)
        hosts.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if not hosts.is_first():
            logging.disable(logging.WARNING)  # one process tells; errors are every process's own
        if _ONLY.value and config.stage != "pipeline":
            raise UserError(f"--only={_ONLY.value}: {file} is no pipeline")
        stages.run(config, workdir, **({"only": _ONLY.value} if _ONLY.value else {}))
        if not _ONLY.value and (command := stages.next_command(config, workdir)):
            logging.info("next: %s", command)
    except UserError as error:
        fail(error)
    except OSError as error:  # a disk that is full or read-only, a file where a directory should be
        fail(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(
            "btx_jax: interrupted; run the same command to go on from the last checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
