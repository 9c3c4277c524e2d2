"""Estimate the disk space that a run needs and compare it with the free space."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from btx_jax.buckets import is_on_bucket
from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.models.llama import leaf_counts
from btx_jax.models.lora import is_adapter
from btx_jax.terminal import size
from btx_jax.training.optimizer import is_trained

BYTES = 4  # per parameter, and per entry of AdamW's second moment


def storage(stage: Config, model: ModelConfig) -> float:
    """Upper bound, in bytes, on the checkpoints that a stage leaves on disk; a training stage keeps
    the newest ones and the best. model: the model that the stage writes."""
    leaves = leaf_counts(model)
    if not stage.train:
        held = (path for path in leaves if not model.lora or is_adapter(path))
        return BYTES * sum(leaves[path][0] for path in held)
    assert stage.checkpoint
    own = trained = 0
    for path, (count, _) in leaves.items():
        is_own = is_trained(path, stage.train.frozen)
        trained += count * is_own
        own += count * (is_own or stage.train.frozen not in ("base", "shared"))
    saved = math.ceil(stage.train.steps / stage.checkpoint.every)
    kept = min(saved, stage.checkpoint.keep + bool(stage.checkpoint.best))
    moments = jnp.dtype(stage.train.first_moment_dtype).itemsize + BYTES
    return kept * (own * BYTES + trained * moments)


def shortage(needed: Mapping[Path, float], workdir: Path) -> str:
    """Return a warning if the disk of `workdir` has less free space than may still be written, else
    "". Always "" in a bucket. needed: directory of a stage -> its `storage`."""
    if is_on_bucket(workdir):
        return ""
    left = sum(max(most - _written(directory), 0.0) for directory, most in needed.items())
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if left <= free:
        return ""
    return (
        f"{workdir}: checkpoints may need up to {size(left)} more, but its disk has only"
        f" {size(free)} free; free some space, or choose a --workdir on a larger disk"
    )


def _written(directory: Path) -> int:
    """Total bytes of the files below a directory; 0 if it does not exist."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
