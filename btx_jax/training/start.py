"""Where a training run starts: its model and its mesh, checked before anything compiles."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from btx_jax.checkpoints.adapter import from_tensors, to_tensors
from btx_jax.checkpoints.checkpoint import Checkpoint, adapter_tensors, find_checkpoint, load_base
from btx_jax.checkpoints.training_state import Base
from btx_jax.config import Config
from btx_jax.config_dict import differences, to_dict
from btx_jax.errors import ConfigError, Mistakes
from btx_jax.model_config import LoRAConfig, ModelConfig
from btx_jax.models.llama import Params, init_params
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import state_shardings

SCRATCH = "scratch"


def starting_point(config: Config) -> tuple[Checkpoint | None, ModelConfig]:
    """(checkpoint or None, model). Raises ConfigError as `starting_model` does, UserError when
    there is no such checkpoint."""
    if not config.init:
        raise ConfigError(
            f"config.init: not set; name the checkpoint to start from, or {SCRATCH!r} for random"
            " parameters"
        )
    init = None if config.init == SCRATCH else find_checkpoint(config.init, "config.init")
    return init, starting_model(config, init.about.model if init else None)


def starting_model(config: Config, held: ModelConfig | None) -> ModelConfig:
    """The model that trains. held: that of the checkpoint it starts from, None for scratch. Raises
    ConfigError when the config's model is another one, or neither is there, or its LoRA experts are
    others than the checkpoint's."""
    if held is None:
        if config.model is None:
            raise ConfigError("config.model: missing, and config.init='scratch' needs it")
        if config.lora or config.model.lora:
            raise ConfigError(
                "config.init='scratch': LoRA experts need a base; name its checkpoint"
            )
        return config.model
    if config.model is not None and (changed := differences(to_dict(held), to_dict(config.model))):
        cure = (
            "choose the config for that model, or for a mixture configs/moe_finetune.py:from_init"
        )
        raise ConfigError(
            f"config.model: is not the model of {config.init}: {'; '.join(changed)}; {cure}"
        )
    return adapted_model(held, config.lora)


def adapted_model(model: ModelConfig, lora: LoRAConfig | None) -> ModelConfig:
    """The checkpoint's model with the config's LoRA experts. Where it has some already, only how
    they are used may change: k, dropout, and gating, for which a router may be new."""
    if lora is None:
        return model
    if model.lora:
        used = ("k", "dropout", "gating")
        shape = {key: value for key, value in to_dict(lora).items() if key not in used}
        held = {key: value for key, value in to_dict(model.lora).items() if key not in used}
        if changed := differences(held, shape):
            raise ConfigError(
                f"config.lora: are other LoRA experts than the checkpoint's: {'; '.join(changed)};"
                " leave the section out"
            )
    try:
        return dataclasses.replace(model, lora=lora)
    except ConfigError as error:
        raise ConfigError(
            *(f"config.lora: {told.removeprefix('lora.')}" for told in error.args)
        ) from None


def start_adapted(
    init: Checkpoint, model: ModelConfig, abstract: Any, key: jax.Array
) -> tuple[Params, Base]:
    """Step 0 of LoRA experts: (all parameters, the base under them). What the checkpoint does not
    hold of the experts is new."""
    abstract_experts, abstract_base = partition(abstract, is_adapter)
    tensors = to_tensors(
        model, jax.jit(lambda key: partition(init_params(model, key), is_adapter)[0])(key)
    )
    if init.about.base:
        tensors |= adapter_tensors(init)
    experts = from_tensors(model, tensors, init.path)
    placed = jax.tree.map(
        lambda x, a: jax.make_array_from_callback(a.shape, a.sharding, lambda i: x[i]),
        experts,
        abstract_experts,
    )
    params, base = load_base(
        init.about.base or Base(str(init.path), ""), model, abstract_base, init.path
    )
    return join(placed, params), base


def checked_mesh(
    config: Config, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over all devices, or over these, once everything that must divide does. Raises
    ConfigError with all that does not fit, naming the keys."""
    assert config.train and config.data and config.compute and config.mesh
    mistakes = Mistakes()
    shape = None
    with mistakes.gather():
        shape = config.mesh.shape(jax.device_count() if devices is None else len(devices))
    for told in _misfits(config, model, math.prod(shape[:3]) if shape else 1):
        mistakes.add(told)
    mistakes.tell()
    assert shape
    made = make_mesh(shape, devices)
    state_shardings(model, config.train, made)  # raises for a dimension that does not divide
    return made


def _misfits(config: Config, model: ModelConfig, shards: int) -> Iterator[str]:
    """Between the sections of a training config and its model. shards: that a batch is cut into."""
    assert config.train and config.data and config.compute
    train, data, compute = config.train, config.data, config.compute
    if (train.batch_size // train.accumulate) % shards:
        yield (
            f"config.train.batch_size={train.batch_size}: its micro-batches of"
            f" {train.batch_size // train.accumulate} do not divide over the {shards} devices of"
            f" data x fsdp x expert; use a multiple of {shards * train.accumulate}"
        )
    if data.sequence_length > model.context:
        yield (
            f"config.data.sequence_length={data.sequence_length}: longer than"
            f" config.model.context={model.context}"
        )
    if (
        model.moe
        and compute.group_size < data.sequence_length
        and data.sequence_length % compute.group_size
    ):
        yield (
            f"config.compute.group_size={compute.group_size}: does not divide"
            f" config.data.sequence_length={data.sequence_length}"
        )
    if model.lora and train.frozen not in ("base", "all_but_routers"):
        yield (
            f"config.train.frozen={train.frozen!r}: the optimizer would hold leaves of the base,"
            " which LoRA experts leave as it is; set it to 'base' (or to 'all_but_routers')"
        )
    if train.frozen == "base" and not model.lora:
        yield (
            "config.train.frozen='base': there are no LoRA experts to train; add a lora section to"
            " the config"
        )
    if (
        train.frozen == "all_but_routers"
        and model.lora
        and not any(spec.lora and spec.lora.has_router for spec in model.layer_specs())
    ):
        yield ("config.train.frozen='all_but_routers': plain LoRA has no router")
    if train.frozen in ("experts", "all_but_routers") and not (model.moe or model.lora):
        yield (f"config.train.frozen={train.frozen!r}: the model has no experts")
