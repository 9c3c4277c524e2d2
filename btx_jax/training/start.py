"""Where a training run starts: its model and its mesh, checked before anything compiles."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
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
from btx_jax.models.layers import platform_dispatch
from btx_jax.models.leaves import is_anchor, is_feed_forward, is_router
from btx_jax.models.llama import Params, init_params, parameter_counts
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import state_shardings

log = logging.getLogger(__name__)

SCRATCH = "scratch"

# Peak rates of weights that hold much training: the default of transformers' Trainer, between the
# 1e-5 and 1e-4 of published continuations; and of LoRA experts beside them (MoLA, section 4.1).
PRETRAINED_RATE, PRETRAINED_LORA_RATE = 5e-5, 3e-4
# Of others: Llama's 3e-4 at 7B (as Llama 3 at 8B), falling with the fourth root of the size, which
# also gives TinyLlama's 4e-4 at 1.1B and Llama's 1.5e-4 at 65B; the caps are what the demo takes.
FRESH_RATE, FRESH_LORA_RATE = 2e-3, 5e-3
COMPUTE_OPTIMAL = 20  # tokens a parameter (Hoffmann et al., 2022); more is much training


def starting_point(config: Config) -> tuple[Checkpoint | None, ModelConfig]:
    """(checkpoint or None, model). Raises ConfigError as `starting_model` does, UserError when
    there is no such checkpoint."""
    if not config.init:
        raise ConfigError(
            f"config.init: not set; name the checkpoint to start from, or {SCRATCH!r} for random"
            " parameters"
        )
    init = None if config.init == SCRATCH else find_checkpoint(config.init, "config.init")
    return init, starting_model(config, init.metadata.model if init else None)


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
        if config.train and (config.train.frozen == "shared" or config.train.anchor):
            key = "anchor" if config.train.anchor else "frozen='shared'"
            raise ConfigError(
                f"config.train.{key}: random weights are no base that branches share; name a"
                " checkpoint in config.init"
            )
        return config.model
    if config.model is not None and (changed := differences(to_dict(held), to_dict(config.model))):
        cure = "choose the config for that model, or the same config's :from_init"
        raise ConfigError(
            f"config.model: is not the model of {config.init}: {'; '.join(map(str, changed))};"
            f" {cure}"
        )
    return trained_model(config, held)


def trained_model(config: Config, held: ModelConfig) -> ModelConfig:
    """The model that trains from this one: with the config's LoRA experts, or beside its anchor.
    Raises ConfigError."""
    adapted = adapted_model(held, config.lora)
    return anchored_model(adapted) if config.train and config.train.anchor else adapted


def anchored_model(model: ModelConfig) -> ModelConfig:
    """What a branch of a dense model is while it trains beside its anchor: a mixture of the two.
    One that has an anchor stays as it is. Raises ConfigError for what cannot have one."""
    if model.has_anchor:
        return model
    if model.moe or model.lora:
        what = "the model is a mixture already" if model.moe else "the model has LoRA experts"
        raise ConfigError(f"config.train.anchor: {what}; branches start from a dense checkpoint")
    try:
        return dataclasses.replace(model, moe=MoEConfig((1,) * model.layers, k=2, anchor=True))
    except ConfigError as error:
        raise ConfigError(*(f"config.train.anchor: {told}" for told in error.args)) from None


def is_pretrained(metadata: CheckpointMetadata) -> bool:
    """Whether these weights hold training that a high rate would undo: somebody else's, or much of
    our own."""
    runs = [run for run in metadata.history.values() if run]
    tokens = sum(run.tokens for run in runs)
    return (
        len(runs) < max(len(metadata.history), 1)  # a part was made elsewhere
        or tokens >= COMPUTE_OPTIMAL * parameter_counts(metadata.model)[1]
    )


def default_learning_rate(
    init: CheckpointMetadata | None, model: ModelConfig, train: TrainConfig
) -> float:
    """What config.train.learning_rate=0 stands for. init: what the run starts from, None for random
    weights."""
    pretrained = init is not None and is_pretrained(init)
    if train.frozen == "base":
        return PRETRAINED_LORA_RATE if pretrained else FRESH_LORA_RATE
    if pretrained:
        return PRETRAINED_RATE
    rate = min(FRESH_RATE, 3e-4 * (7e9 / parameter_counts(model)[1]) ** 0.25)
    return float(f"{rate:.1e}")


def settled(config: Config, recorded: Mapping[str, Any]) -> Config:
    """The config with what it leaves to us decided: the learning rate and the dispatch. recorded:
    the config of an interrupted run of it, whose decisions stay, whatever the machine is now; else
    empty."""
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
        log.info("learning rate %g, chosen by what the run starts from", rate)
    return dataclasses.replace(config, compute=compute, train=train)


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
                "config.lora: are other LoRA experts than the checkpoint's:"
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
    """Step 0 of LoRA experts: (all parameters, the base under them). What the checkpoint does not
    hold of the experts is new."""
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
    """Whether `start_branch` starts it: what has an anchor and is whole already, since more than
    its feed-forwards was trained, goes on as any model."""
    if model.has_anchor and init.model.has_anchor:
        return train.frozen == "shared" and init.base is not None
    return train.frozen == "shared" or model.has_anchor


def start_branch(init: Checkpoint, model: ModelConfig, abstract: Any) -> tuple[Params, Base]:
    """Step 0 of a branch that keeps all of its base but the feed-forwards, or has these as its
    anchor: (all parameters, the base). That of a branch of a branch is the first one's, as long as
    both have an anchor or neither.

    Beside a new anchor stands its copy; router and biases are zero, which opens both by one half,
    so that the branch is its base to the last bit.
    """
    own, shared = partition(abstract, is_feed_forward)
    is_new = model.has_anchor and not init.metadata.model.has_anchor
    before = None if is_new else init.metadata.base
    params, base = load_base(before or Base(str(init.path), ""), model, shared, init.path)
    return join(_beside_anchor(init, abstract) if is_new else load_part(init, own), params), base


def _beside_anchor(init: Checkpoint, abstract: Any) -> Params:
    """A dense model's feed-forwards as the only expert of each layer, whatever dtype the anchor is
    kept in, and the router between the two."""
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
    """The mesh over all devices, or over these, once everything that must divide does. Raises
    ConfigError with all that does not fit, naming the keys."""
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
    """The most micro-batches, up to those of the config, that divide over so many devices; 0 for
    none."""
    counts = range(train.accumulate, 0, -1)
    return next((n for n in counts if train.batch_size % (n * shards) == 0), 0)


def _misfits(
    config: Config, model: ModelConfig, shape: tuple[int, int, int, int, int], platform: str
) -> Iterator[str]:
    """Between the sections of a training config and its model. shape: of the mesh."""
    assert config.train and config.data and config.compute
    shards, expert_axis, context_axis = math.prod(shape[:3]), shape[2], shape[4]
    train, data, compute = config.train, config.data, config.compute
    if (train.batch_size // train.accumulate) % shards:
        fewer = dividing_accumulate(train, shards)
        cure = (
            f"use config.train.accumulate={fewer}"
            if fewer
            else f"use a multiple of {shards * train.accumulate}"
            + (f", or of {shards} with config.train.accumulate=1" if train.accumulate > 1 else "")
        )
        yield (
            f"config.train.batch_size={train.batch_size}: its micro-batches of"
            f" {train.batch_size // train.accumulate} do not divide over the {shards} devices of"
            f" data x fsdp x expert; {cure}"
        )
    if data.sequence_length > model.context:
        yield (
            f"config.data.sequence_length={data.sequence_length}: longer than"
            f" config.model.context={model.context}"
        )
    pieces = 2 * context_axis if context_axis > 1 else 1  # of a row (parallel/sequence.py)
    if data.sequence_length % pieces:
        yield (
            f"config.data.sequence_length={data.sequence_length}: does not divide into two pieces"
            f" for each of the {context_axis} devices of config.mesh.context; use a multiple of"
            f" {pieces}"
        )
    elif (
        model.moe
        and platform_dispatch(compute.dispatch, platform, expert_axis) == "einsum"
        and (compute.group_size < data.sequence_length or pieces > 1)
        and data.sequence_length // pieces % compute.group_size
    ):
        cut = f" / {pieces} (two pieces a device of config.mesh.context)" if pieces > 1 else ""
        yield (
            f"config.compute.group_size={compute.group_size}: does not divide"
            f" config.data.sequence_length={data.sequence_length}{cut}"
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
    if train.frozen in ("shared", "shared_layers") and model.moe and not model.has_anchor:
        yield (
            f"config.train.frozen={train.frozen!r}: the model is a mixture already; branches are"
            " dense (or set it to 'experts' or 'all_but_routers')"
        )
    if train.frozen == "anchor" and not model.has_anchor:
        yield "config.train.frozen='anchor': the model has none; set config.train.anchor to True"
    if train.balance_weight and model.is_branch:
        yield (
            f"config.train.balance_weight={train.balance_weight:g}: a branch and its anchor need"
            " not share the work evenly; set it to 0"
        )
    if train.mixing_probe and config.init == SCRATCH:
        yield (
            "config.train.mixing_probe: random weights are no seed that branches share; name a"
            " checkpoint in config.init, or set it to False"
        )
    if train.mixing_probe and model.moe and not model.is_branch:
        yield (
            "config.train.mixing_probe: the model is a mixture already, and no branch that will"
            " be mixed; set it to False"
        )
    if (
        train.frozen == "all_but_routers"
        and model.lora
        and not any(spec.lora and spec.lora.has_router for spec in model.layer_specs())
    ):
        yield ("config.train.frozen='all_but_routers': plain LoRA has no router")
    if train.frozen in ("experts", "all_but_routers") and not (model.moe or model.lora):
        yield (f"config.train.frozen={train.frozen!r}: the model has no experts")
