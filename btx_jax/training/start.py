"""Where a training run starts: its model and its mesh, checked before anything compiles."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from btx_jax.checkpoints.checkpoint import Checkpoint, find_checkpoint
from btx_jax.config import Config, ConfigError, ModelConfig
from btx_jax.config_dict import differences, to_dict
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import state_shardings

SCRATCH = "scratch"


def starting_point(config: Config) -> tuple[Checkpoint | None, ModelConfig]:
    """(checkpoint or None, model). Raises ConfigError when the config's model is not the checkpoint's, or neither is there."""
    if not config.init:
        raise ConfigError(f"config.init: not set; name the checkpoint to start from, or {SCRATCH!r} for random parameters")
    if config.init == SCRATCH:
        if config.model is None:
            raise ConfigError("config.model: missing, and config.init='scratch' needs it")
        return None, config.model
    init = find_checkpoint(config.init, "config.init")
    if config.model is not None and (changed := differences(to_dict(init.about.model), to_dict(config.model))):
        cure = "choose the config for that model, or for a mixture configs/moe_finetune.py:from_init"
        raise ConfigError(f"config.model: is not the model of {config.init}: {'; '.join(changed)}; {cure}")
    return init, init.about.model


def checked_mesh(config: Config, model: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or over these, once everything that must divide does. Raises ConfigError naming the key."""
    assert config.train and config.data and config.compute and config.mesh
    train, data, compute = config.train, config.data, config.compute
    shape = config.mesh.shape(jax.device_count() if devices is None else len(devices))
    shards = math.prod(shape[:3])
    if (train.batch_size // train.accumulate) % shards:
        raise ConfigError(
            f"config.train.batch_size={train.batch_size}: its micro-batches of {train.batch_size // train.accumulate} do not divide "
            f"over the {shards} devices of data x fsdp x expert; use a multiple of {shards * train.accumulate}"
        )
    if data.sequence_length > model.context:
        raise ConfigError(f"config.data.sequence_length={data.sequence_length}: longer than config.model.context={model.context}")
    if model.moe and compute.group_size < data.sequence_length and data.sequence_length % compute.group_size:
        raise ConfigError(
            f"config.compute.group_size={compute.group_size}: does not divide config.data.sequence_length={data.sequence_length}"
        )
    if train.frozen and not model.moe:
        raise ConfigError(f"config.train.frozen={train.frozen!r}: the model has no experts")
    made = make_mesh(shape, devices)
    state_shardings(model, train, made)  # raises for a dimension that does not divide
    return made
