"""The stages of a run. Each reads checkpoints and text and writes one directory; each is idempotent
and resumable.

A stage module has `run(config, workdir)` and `check(config, coming, mistakes)`, which collects all
known mistakes before any work, reads only what that requires, and writes nothing.
"""

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path

from btx_jax.buckets import explained
from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import Mistakes
from btx_jax.parallel.hosts import is_first
from btx_jax.rundir import held, settle_names

# For a pipeline, what its unfinished stages will write: directory of the stage -> its model, None
# if unknown.
Coming = Mapping[str, ModelConfig | None]


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    """Check config.stage: add what is wrong to mistakes, and return the model that it will write,
    None if none or unknown."""
    stage = importlib.import_module(f"btx_jax.stages.{config.stage}")
    return stage.check(config, coming, mistakes)


def require_right(config: Config) -> None:
    """`check` for a stage about to run. Must be called by every process, as a mesh spans all of
    them. Raises ConfigError with everything that is wrong."""
    mistakes = Mistakes()
    check(config, {}, mistakes)
    mistakes.tell()


def run(config: Config, workdir: Path, **options: str) -> None:
    """Run config.stage in workdir. A stage that has already finished there returns at once.
    options: for the pipeline stage only.

    Raises UserError when another process is running there, or nothing can be written there. A run
    that is refused leaves no directory behind.
    """
    stage = importlib.import_module(f"btx_jax.stages.{config.stage}")
    # A single stage of a pipeline (--only) runs alongside others, and holds only its own directory.
    takes_directory = is_first() and not options
    with explained():
        settle_names(workdir, config)
        with held(workdir) if takes_directory else contextlib.nullcontext():
            stage.run(config, workdir, **options)


def next_command(config: Config, workdir: Path) -> str:
    """A useful next command after a run has finished; "" if there is none."""
    if (workdir / "report.html").exists():
        return f"open {workdir / 'report.html'}"
    if config.stage == "mix":
        return f"btx run moe_finetune:from_init --config.init={workdir}"
    if config.stage == "train":
        return f"btx generate {workdir} --prompt '...'"
    return ""
