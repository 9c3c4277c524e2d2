"""Export: write a checkpoint as a Hugging Face directory, WORKDIR/model."""

import logging
import time
from pathlib import Path

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.checkpoints.converting import convert
from btx_jax.checkpoints.huggingface import written_as
from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import ConfigError, Mistakes
from btx_jax.output import remove
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.rundir import claim, finish, look_up
from btx_jax.stages import Coming, require_right

log = logging.getLogger(__name__)

MODEL = "model"
_KEY = "config.export.model"


def run(config: Config, workdir: Path) -> None:
    assert config.export
    start = time.monotonic()
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return
    require_right(config)
    claim(workdir, config)
    first_then_others(lambda: _write(config, workdir) if is_first() else None)
    finish(workdir, seconds=time.monotonic() - start, model=config.export.model)


def _write(config: Config, workdir: Path) -> None:
    assert config.export
    target = workdir / MODEL
    remove(target)  # left by a killed attempt
    convert(find_checkpoint(config.export.model, _KEY), target, config.export.dtype)
    log.info("wrote %s", target)


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.export
    source = config.export.model
    with mistakes.gather(f"{_KEY}: "):
        if source in coming:
            if model := coming[source]:
                written_as(model, {})
            return model
        found = find_checkpoint(source, _KEY)
        if found.is_huggingface:
            raise ConfigError(f"{source} is already a Hugging Face directory; use it as it is")
        written_as(found.metadata.model, found.metadata.huggingface)
        return found.metadata.model
    return None
