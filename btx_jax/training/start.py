"""Starting point of a training run: its model, initial parameters and mesh, checked before anything
is compiled."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from btx_jax.checkpoints.adapter import from_tensors, to_tensors
from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    adapter_tensors,
    find_checkpoint,
    load_base,
    load_part,
)
from btx_jax.checkpoints.training_state import Base, CheckpointMetadata
from btx_jax.config.config import Config, TrainConfig
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.config.model_config import LoRAConfig, ModelConfig, MoEConfig
from btx_jax.errors import ConfigError, Mistakes
from btx_jax.models.layers import foreign_kernels, platform_dispatch
from btx_jax.models.leaves import is_anchor, is_feed_forward, is_router
from btx_jax.models.llama import Params, init_params, parameter_counts
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import state_shardings

log = logging.getLogger(__name__)

SCRATCH = "scratch"

# Peak learning rates for pretrained weights: the default of transformers' Trainer, which lies
# between the 1e-5 and 1e-4 of published continued pretraining; and for LoRA experts on pretrained
# weights (MoLA, section 4.1).
PRETRAINED_RATE, PRETRAINED_LORA_RATE = 5e-5, 3e-4
# Peak rates for other weights: Llama's 3e-4 at 7B (also Llama 3's at 8B), scaled with the inverse
# fourth root of the size. This also gives TinyLlama's 4e-4 at 1.1B and Llama's 1.5e-4 at 65B. The
# caps are the demo's rates.
FRESH_RATE, FRESH_LORA_RATE = 2e-3, 5e-3
# Tokens per parameter (Hoffmann et al., 2022); weights with at least this many count as pretrained.
COMPUTE_OPTIMAL = 20


def starting_point(config: Config) -> tuple[Checkpoint | None, ModelConfig]:
    """Return (checkpoint, model) that a run starts from; the checkpoint is None for random
    parameters. Raises ConfigError if config.init is not set and as `starting_model` does, UserError
    if the checkpoint does not exist."""
    if not config.init:
        raise ConfigError(
            f"config.init: missing; name the checkpoint to start from, or {SCRATCH!r} for"
            " random parameters"
        )
    init = None if config.init == SCRATCH else find_checkpoint(config.init, "config.init")
    return init, starting_model(config, init.metadata.model if init else None)


def starting_model(config: Config, held: ModelConfig | None) -> ModelConfig:
    """The model to train. held: the model of the checkpoint in config.init; None for scratch.

    Raises ConfigError if the config names another model, if there is neither a checkpoint nor a
    model, if the run needs a base but starts from scratch, or if the LoRA experts differ from the
    checkpoint's.
    """
    if held is None:
        if config.model is None:
            raise ConfigError("config.model: missing, but config.init='scratch' needs it")
        if config.lora or config.model.lora:
            raise ConfigError(
                "config.init='scratch': LoRA experts need a base; name its checkpoint"
            )
        if config.train and (config.train.frozen == "shared" or config.train.anchor):
            key = "anchor" if config.train.anchor else "frozen='shared'"
            raise ConfigError(
                f"config.train.{key}: branches cannot share random weights as their base; name a"
                " checkpoint in config.init"
            )
        return config.model
    if config.model is not None and (changed := differences(to_dict(held), to_dict(config.model))):
        cure = "choose the config for that model, or this config's :from_init"
        raise ConfigError(
            f"config.model: differs from the model of {config.init}:"
            f" {'; '.join(map(str, changed))}; {cure}"
        )
    return trained_model(config, held)


def trained_model(config: Config, held: ModelConfig) -> ModelConfig:
    """The model to train, starting from `held`: with LoRA experts or an anchor added where the
    config asks for them. Raises ConfigError for an impossible combination."""
    adapted = adapted_model(held, config.lora)
    return anchored_model(adapted) if config.train and config.train.anchor else adapted


def anchored_model(model: ModelConfig) -> ModelConfig:
    """The model of a dense branch trained with an anchor: a mixture of one expert per layer and the
    anchor. A model that already has an anchor is returned unchanged. Raises ConfigError for a model
    that cannot have one."""
    if model.has_anchor:
        return model
    if model.moe or model.lora:
        what = "the model is already a mixture" if model.moe else "the model has LoRA experts"
        raise ConfigError(f"config.train.anchor: {what}; branches start from a dense checkpoint")
    try:
        return dataclasses.replace(model, moe=MoEConfig((1,) * model.layers, k=2, anchor=True))
    except ConfigError as error:
        raise ConfigError(*(f"config.train.anchor: {told}" for told in error.args)) from None


def is_pretrained(metadata: CheckpointMetadata) -> bool:
    """Whether these weights have had training that a high learning rate would undo: any training
    outside btx_jax, or a compute-optimal amount in it."""
    runs = [run for run in metadata.history.values() if run]
    tokens = sum(run.tokens for run in runs)
    return (
        len(runs) < max(len(metadata.history), 1)  # some weights were made elsewhere
        or tokens >= COMPUTE_OPTIMAL * parameter_counts(metadata.model)[1]
    )


def default_learning_rate(
    init: CheckpointMetadata | None, model: ModelConfig, train: TrainConfig
) -> float:
    """The peak learning rate that config.train.learning_rate=0 stands for. init: metadata of the
    checkpoint that the run starts from; None for random weights."""
    pretrained = init is not None and is_pretrained(init)
    if train.frozen == "base":
        return PRETRAINED_LORA_RATE if pretrained else FRESH_LORA_RATE
    if pretrained:
        return PRETRAINED_RATE
    rate = min(FRESH_RATE, 3e-4 * (7e9 / parameter_counts(model)[1]) ** 0.25)
    return float(f"{rate:.1e}")


def settled(config: Config, recorded: Mapping[str, Any]) -> Config:
    """The config with its automatic values filled in: learning rate and dispatch.

    recorded: the config recorded by the interrupted run to resume, whose choices are kept whatever
    the machine; empty for a new run.
    """
    assert config.train and config.compute and config.mesh
    compute, train = config.compute, config.train
    same = recorded.get("init") == config.init
    if compute.dispatch == "auto":
        dispatch = recorded.get("compute", {}).get("dispatch") if same else None
        if dispatch is None:
            expert_axis = config.mesh.shape(jax.device_count())[2]
            dispatch = platform_dispatch(compute.dispatch, jax.default_backend(), expert_axis)
        compute = dataclasses.replace(compute, dispatch=dispatch)
    if not train.learning_rate:
        rate = recorded.get("train", {}).get("learning_rate") if same else None
        if rate is None:
            init, model = starting_point(config)
            rate = default_learning_rate(init.metadata if init else None, model, train)
        train = dataclasses.replace(train, learning_rate=rate)
        log.info("learning rate %g, chosen for the model that the run starts from", rate)
    return dataclasses.replace(config, compute=compute, train=train)


def adapted_model(model: ModelConfig, lora: LoRAConfig | None) -> ModelConfig:
    """The checkpoint's model with the config's LoRA experts. If the model already has LoRA experts,
    only k, dropout and gating may change; a new gating may need a new router. Raises ConfigError
    for other changes and for LoRA experts that the model cannot have."""
    if lora is None:
        return model
    if model.lora:
        used = ("k", "dropout", "gating")
        shape = {key: value for key, value in to_dict(lora).items() if key not in used}
        held = {key: value for key, value in to_dict(model.lora).items() if key not in used}
        if changed := differences(held, shape):
            raise ConfigError(
                "config.lora: differs from the LoRA experts of the checkpoint:"
                f" {'; '.join(map(str, changed))}; leave the section out"
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
    """Initial parameters of a run that trains LoRA experts: (all parameters, their base). Expert
    parameters that the checkpoint lacks are newly initialised. abstract: all parameters, with
    shardings."""
    abstract_experts, abstract_base = partition(abstract, is_adapter)
    tensors = to_tensors(
        model, jax.jit(lambda key: partition(init_params(model, key), is_adapter)[0])(key)
    )
    if init.metadata.base:
        tensors |= adapter_tensors(init)
    experts = from_tensors(model, tensors, init.path)
    placed = jax.tree.map(
        lambda x, a: jax.make_array_from_callback(a.shape, a.sharding, lambda i: x[i]),
        experts,
        abstract_experts,
    )
    params, base = load_base(
        init.metadata.base or Base(str(init.path), ""), model, abstract_base, init.path
    )
    return join(placed, params), base


def is_started_as_branch(init: CheckpointMetadata, model: ModelConfig, train: TrainConfig) -> bool:
    """Whether `start_branch` makes the initial parameters of this run. A model with an anchor that
    is stored in full, because more than its feed-forwards was trained, starts like any other
    model."""
    if model.has_anchor and init.model.has_anchor:
        return train.frozen == "shared" and init.base is not None
    return train.frozen == "shared" or model.has_anchor


def start_branch(init: Checkpoint, model: ModelConfig, abstract: Any) -> tuple[Params, Base]:
    """Initial parameters of a branch that trains only its base's feed-forwards, or keeps them as
    its anchor: (all parameters, the base). A branch of a branch keeps the first branch's base,
    provided that both have an anchor or neither does. abstract: all parameters, with shardings.

    The expert next to a new anchor starts as a copy of it. Router and biases start at zero, so
    expert and anchor both get a gate of one half, and the branch equals its base bit for bit.
    """
    own, shared = partition(abstract, is_feed_forward)
    is_new = model.has_anchor and not init.metadata.model.has_anchor
    before = None if is_new else init.metadata.base
    params, base = load_base(before or Base(str(init.path), ""), model, shared, init.path)
    return join(_beside_anchor(init, abstract) if is_new else load_part(init, own), params), base


def _beside_anchor(init: Checkpoint, abstract: Any) -> Params:
    """Copy a dense model's feed-forwards into the single expert of each layer, whatever the
    anchor's dtype, and add a zero router."""
    own = partition(abstract, is_feed_forward)[0]
    copies = {
        run: {
            "ffn": {
                name: jax.ShapeDtypeStruct(
                    x.shape, own[run]["ffn"][name].dtype, sharding=x.sharding
                )
                for name, x in tree["anchor"].items()
            }
        }
        for run, tree in partition(abstract, is_anchor)[0].items()
    }

    def make(copies):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: (
                jnp.zeros(x.shape, x.dtype)
                if is_router(path)
                else copies[path[0].key]["ffn"][path[-1].key][:, None]
            ),
            own,
        )

    shardings = jax.tree.map(lambda x: x.sharding, own)
    return jax.jit(make, out_shardings=shardings)(load_part(init, copies))


def checked_mesh(
    config: Config, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over the given devices, by default all, after checking that every size divides.
    Raises a ConfigError that lists every conflict by its config key."""
    assert config.train and config.data and config.compute and config.mesh
    mistakes = Mistakes()
    shape = None
    with mistakes.gather():
        shape = config.mesh.shape(jax.device_count() if devices is None else len(devices))
    platform = devices[0].platform if devices else jax.default_backend()
    for told in _misfits(config, model, shape or (1, 1, 1, 1, 1), platform):
        mistakes.add(told)
    mistakes.tell()
    assert shape
    made = make_mesh(shape, devices)
    state_shardings(model, config.train, made)  # raises for a dimension that does not divide
    return made


def dividing_accumulate(train: TrainConfig, shards: int) -> int:
    """The largest number of micro-batches, at most the config's, whose rows divide over this many
    shards; 0 if there is none."""
    counts = range(train.accumulate, 0, -1)  # empty for accumulate=0 (automatic)
    return next((n for n in counts if train.batch_size % (n * shards) == 0), 0)


def _misfits(
    config: Config, model: ModelConfig, shape: tuple[int, int, int, int, int], platform: str
) -> Iterator[str]:
    """Yield a message for every conflict between a training config's sections, its model and the
    mesh. shape: of the mesh."""
    assert config.train and config.data and config.compute
    shards, expert_axis, context_axis = math.prod(shape[:3]), shape[2], shape[4]
    train, data, compute = config.train, config.data, config.compute
    if not train.accumulate and train.batch_size % shards:
        yield (
            f"config.train.batch_size={train.batch_size}: not divisible by the {shards} devices"
            f" of data x fsdp x expert; use a multiple of {shards}"
        )
    if train.accumulate and (train.batch_size // train.accumulate) % shards:
        fewer = dividing_accumulate(train, shards)
        cure = (
            f"use config.train.accumulate={fewer}"
            if fewer
            else f"use a multiple of {shards * train.accumulate}"
            + (f", or of {shards} with config.train.accumulate=1" if train.accumulate > 1 else "")
        )
        yield (
            f"config.train.batch_size={train.batch_size}: its micro-batches of"
            f" {train.batch_size // train.accumulate} are not divisible by the {shards} devices"
            f" of data x fsdp x expert; {cure}"
        )
    if data.sequence_length > model.context:
        yield (
            f"config.data.sequence_length={data.sequence_length}: longer than"
            f" config.model.context={model.context}; lower it"
        )
    pieces = 2 * context_axis if context_axis > 1 else 1  # per row (parallel/sequence.py)
    if data.sequence_length % pieces:
        yield (
            f"config.data.sequence_length={data.sequence_length}: not divisible into two pieces"
            f" for each of the {context_axis} devices of config.mesh.context; use a multiple of"
            f" {pieces}"
        )
    elif (
        model.moe
        and platform_dispatch(compute.dispatch, platform, expert_axis) == "einsum"
        and (compute.group_size < data.sequence_length or pieces > 1)
        and data.sequence_length // pieces % compute.group_size
    ):
        cut = f" / {pieces} (two pieces per device of config.mesh.context)" if pieces > 1 else ""
        yield (
            f"config.compute.group_size={compute.group_size}: does not divide"
            f" config.data.sequence_length={data.sequence_length}{cut}; use a divisor"
        )
    if mistake := foreign_kernels(compute.kernels, platform):
        yield mistake
    if compute.quantize != "none":
        if find_spec("qwix") is None:
            yield "config.compute.quantize: needs a package: pip install 'btx_jax[int8]'"
        if model.moe and platform_dispatch(compute.dispatch, platform, expert_axis) == "ragged":
            yield (
                f"config.compute.quantize={compute.quantize!r}: ragged dispatch does not"
                " support quantized experts; set config.compute.dispatch to 'einsum'"
            )
    if model.lora and train.frozen not in ("base", "all_but_routers"):
        yield (
            f"config.train.frozen={train.frozen!r}: the optimizer would hold parameters of the"
            " base, which LoRA leaves unchanged; set it to 'base' (or to 'all_but_routers')"
        )
    if train.frozen == "base" and not model.lora:
        yield (
            "config.train.frozen='base': there are no LoRA experts to train; add a lora section to"
            " the config"
        )
    if train.frozen in ("shared", "shared_layers") and model.moe and not model.has_anchor:
        yield (
            f"config.train.frozen={train.frozen!r}: the model is already a mixture, but"
            " branches are dense; leave it out (or set it to 'experts' or 'all_but_routers')"
        )
    if train.frozen == "anchor" and not model.has_anchor:
        yield (
            "config.train.frozen='anchor': the model has no anchor; set config.train.anchor to True"
        )
    if train.balance_weight and model.is_branch:
        yield (
            f"config.train.balance_weight={train.balance_weight:g}: the load of a branch and"
            " its anchor need not be balanced; set it to 0"
        )
    if train.mixing_probe and config.init == SCRATCH:
        yield (
            "config.train.mixing_probe: branches cannot share random weights as their seed; name a"
            " checkpoint in config.init, or set it to False"
        )
    if train.mixing_probe and model.moe and not model.is_branch:
        yield (
            "config.train.mixing_probe: the model is already a mixture, not a branch that will"
            " be mixed; set it to False"
        )
    if (
        train.frozen == "all_but_routers"
        and model.lora
        and not any(spec.lora and spec.lora.has_router for spec in model.layer_specs())
    ):
        yield (
            "config.train.frozen='all_but_routers': plain LoRA has no router to train; set"
            " it to 'base'"
        )
    if train.frozen in ("experts", "all_but_routers") and not (model.moe or model.lora):
        yield (f"config.train.frozen={train.frozen!r}: the model has no experts; leave it out")
