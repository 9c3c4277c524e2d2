"""The stages: each reads checkpoints and text and writes one directory. Each is idempotent and
resumable."""

import contextlib
import importlib
from pathlib import Path

from btx_jax.config import Config
from btx_jax.errors import UserError
from btx_jax.output import locked
from btx_jax.parallel.hosts import is_first


def run(config: Config, workdir: Path, **options: str) -> None:
    """Run config.stage in workdir. A stage that has finished there returns at once. options: of the
    pipeline stage alone.

    Raises UserError when another process of this machine is running there, or nothing can be
    written there.
    """
    stage = importlib.import_module(f"btx_jax.stages.{config.stage}")
    with contextlib.ExitStack() as held:
        if (
            is_first() and not options
        ):  # one stage of a pipeline runs beside others: it takes its own directory
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--workdir: cannot write to {workdir}: {error.strerror}"
                ) from error
            try:
                held.enter_context(locked(workdir))
            except BlockingIOError:
                raise UserError(
                    f"{workdir}: another process is running there; wait for it or choose another"
                    " directory"
                ) from None
            except OSError:  # a file system without locks
                pass
        stage.run(config, workdir, **options)


def next_command(config: Config, workdir: Path) -> str:
    """What a person may want to do when a run has finished, if there is anything."""
    if (workdir / "report.html").exists():
        return f"open {workdir / 'report.html'}"
    if config.stage == "mix":
        finetune = "python -m btx_jax.launch --config=configs/moe_finetune.py:from_init"
        return f"{finetune} --config.init={workdir}"
    if config.stage == "train":
        return f"python -m btx_jax generate {workdir} --prompt '...'"
    return ""
