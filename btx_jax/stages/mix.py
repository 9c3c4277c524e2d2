"""Mix: N dense checkpoints -> one checkpoint (step 0), by Branch-Train-MiX or one of its ablations;
one checkpoint copied N times is sparse upcycling. N adapters of one base -> one mixture of their
LoRA experts."""

import dataclasses
import logging
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from btx_jax.checkpoints.adapter import from_tensors
from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    adapter_tensors,
    find_checkpoint,
    find_own_tokenizer,
    load_params,
    shortest_context,
)
from btx_jax.checkpoints.checksums import write_sums
from btx_jax.checkpoints.training_state import DIRECTORY, CheckpointMetadata, Checkpoints, together
from btx_jax.config.config import CheckpointConfig, Config, MixConfig
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.data.tokenizers import copy_tokenizer, difference, load_tokenizer
from btx_jax.errors import ConfigError, Mistakes
from btx_jax.mixing.lora import mix_lora
from btx_jax.mixing.mix import mix_params, restack
from btx_jax.mixing.router import normal_routers
from btx_jax.mixing.split import blend_models, split_models
from btx_jax.models.llama import abstract_params
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.parallel.sharding import make_mesh, param_shardings
from btx_jax.rundir import claim, finish, look_up
from btx_jax.stages import Coming, require_right

log = logging.getLogger(__name__)


def run(config: Config, workdir: Path) -> None:
    assert config.mix and config.mesh
    start = time.monotonic()
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return
    require_right(config)
    mix = config.mix
    # What an interrupted attempt saved may be of sources that have been replaced since.
    first_then_others(shutil.rmtree, workdir / DIRECTORY, ignore_errors=True)
    sources = [
        find_checkpoint(path, f"config.mix.experts[{i}]") for i, path in enumerate(mix.experts)
    ]
    first = sources[0]
    if any(source.metadata.base for source in sources):
        mix_adapters(config, sources, workdir)
        finish(
            workdir,
            seconds=time.monotonic() - start,
            experts=[str(source.path) for source in sources],
        )
        return
    tokenizers = [load_tokenizer(source.tokenizer) for source in sources]
    for i, tokenizer in enumerate(tokenizers):
        if told := difference(tokenizers[0], tokenizer, first.metadata.model.vocab_size):
            raise ConfigError(
                f"config.mix.experts[{i}]: {tokenizer.path} is another tokenizer than"
                f" {tokenizers[0].path}: {told}"
            )
    dense_model = dataclasses.replace(first.metadata.model, context=shortest_context(sources))
    model = mixed_model(dense_model, mix)
    mesh = make_mesh(config.mesh.shape(jax.device_count()))
    dense = abstract_params(first.metadata.model)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.unbox(dense),
        param_shardings(dense, mesh),
    )

    def mixed(models):
        key = jax.random.key(config.rng_seed)
        models = [params for params in models for _ in range(mix.copies)]
        if mix.method == "split":
            models = split_models(models, mix.chunks)
        elif mix.method == "blend":
            models = blend_models(models)
        runs = model.runs()
        moe_runs = [(name, length, spec.experts) for name, length, spec in runs if spec.experts]
        routers = normal_routers(key, moe_runs, model.d_model, mix.router_std)
        return mix_params(
            [restack(params, [length for _, length, _ in runs]) for params in models], routers
        )

    log.info(
        "mixing %d checkpoints into %s",
        len(sources),
        f"{model.moe.experts[0]} experts" if model.moe else "their mean",
    )
    with jax.set_mesh(mesh):
        mix_jit = jax.jit(mixed, out_shardings=param_shardings(abstract_params(model), mesh))
        params = mix_jit([load_params(source, abstract) for source in sources])
    history = together(source.metadata.history for source in sources)
    claim(workdir, config)
    if is_first():
        copy_tokenizer(tokenizers[0], workdir / "tokenizer")
        write_sums(workdir / "tokenizer")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    try:
        metadata = CheckpointMetadata(model, 0, history, huggingface=first.metadata.huggingface)
        checkpoints.save(metadata, params)
    finally:
        checkpoints.close()
    # Of a blend every expert is made of all.
    own = sources if mix.method in ("btx", "split") else []
    finish(
        workdir,
        seconds=time.monotonic() - start,
        experts=[str(source.path) for source in own for _ in range(mix.copies * mix.chunks)],
    )


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.mix and config.mesh
    models: dict[int, ModelConfig | None] = {}
    for i, path in enumerate(config.mix.experts):
        with mistakes.gather():
            models[i] = (
                coming[path]
                if path in coming
                else find_checkpoint(path, f"config.mix.experts[{i}]").metadata.model
            )
    with mistakes.gather():
        config.mesh.shape(jax.device_count())
    known = {i: model for i, model in models.items() if model is not None}
    mixed = None
    if known and not any(model.lora for model in known.values()):
        n, first = next(iter(known.items()))
        for i, model in known.items():
            # How long it may be used, not what its weights mean.
            other = dataclasses.replace(model, context=first.context)
            if changed := differences(to_dict(first), to_dict(other)):
                mistakes.add(
                    f"config.mix.experts[{i}]: another model than experts[{n}]:"
                    f" {'; '.join(changed)}"
                )
        if first.moe:
            mistakes.add(
                f"config.mix.experts[{n}]: {config.mix.experts[n]} is a mixture already; mix dense"
                " checkpoints"
            )
        else:
            with mistakes.gather():
                context = min(model.context for model in known.values())
                mixed = mixed_model(dataclasses.replace(first, context=context), config.mix)
    return mixed


def mix_adapters(config: Config, sources: list[Checkpoint], workdir: Path) -> None:
    """LoRA experts of one base. Gates trained behind finished experts (lora.gating sigmoid) become
    the router's rows, chosen by cosine.

    Raises ConfigError when they differ in base, rank, alpha or targets, or the config asks for what
    adapters do not have.
    """
    mix, first = config.mix, sources[0].metadata
    assert mix
    if (mix.method, mix.copies, mix.routing, mix.first_routing) != ("btx", 1, "top_k", ""):
        raise ConfigError(
            "config.mix: LoRA experts are mixed with method='btx', routing='top_k' and copies=1"
            " only"
        )
    counts = np.zeros(first.model.layers, int)
    gatings = set()
    for i, source in enumerate(sources):
        metadata = source.metadata
        if (
            metadata.base is None
            or metadata.model.lora is None
            or first.base is None
            or first.model.lora is None
        ):
            raise ConfigError(
                f"config.mix.experts[{i}]: adapters and whole models cannot be mixed; merge the"
                " adapters first"
            )
        if metadata.base.digest != first.base.digest:
            raise ConfigError(
                f"config.mix.experts[{i}]: {source.path} was trained on another base than"
                " experts[0]"
            )
        differ = {key: getattr(metadata.model.lora, key) for key in ("rank", "alpha", "targets")}
        if changed := differences({key: getattr(first.model.lora, key) for key in differ}, differ):
            raise ConfigError(
                f"config.mix.experts[{i}]: other LoRA experts than those of experts[0]:"
                f" {'; '.join(changed)}"
            )
        counts += [
            spec.experts if spec else 0 for spec in metadata.model.lora.specs(metadata.model.layers)
        ]
        gatings.add(metadata.model.lora.gating)
    assert first.base and first.model.lora
    lora = dataclasses.replace(
        first.model.lora,
        allocation=",".join(map(str, counts)) if len(counts) > 1 else str(counts[0]),
        k=(mix.k,),
        gating="cosine" if gatings == {"sigmoid"} else "top_k",
    )
    try:
        model = dataclasses.replace(first.model, lora=lora)
        tensors = mix_lora(
            [adapter_tensors(source) for source in sources],
            mix.router_std,
            np.random.default_rng(config.rng_seed),
        )
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"config.mix: {error}") from error
    log.info(
        "mixing %d adapters into %d LoRA experts a layer at most, %s",
        len(sources),
        max(counts),
        lora.gating,
    )
    history = together(source.metadata.history for source in sources)
    claim(workdir, config)
    if (tokenizer := find_own_tokenizer(sources[0])) is not None:
        copy_tokenizer(tokenizer, workdir / "tokenizer")
        write_sums(workdir / "tokenizer")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    try:
        metadata = CheckpointMetadata(model, 0, history, first.base, first.huggingface)
        checkpoints.save(metadata, from_tensors(model, tensors, workdir))
    finally:
        checkpoints.close()


def mixed_model(dense: ModelConfig, mix: MixConfig) -> ModelConfig:
    """What the mixture is. Raises ConfigError when d_ff cannot be cut as asked."""
    experts = len(mix.experts) * mix.copies * mix.chunks
    if mix.method == "average":
        return dense
    cuts = {"split": mix.chunks, "blend": experts}.get(mix.method, 1)
    if dense.d_ff % cuts:
        raise ConfigError(
            f"config.mix.method={mix.method!r}: d_ff={dense.d_ff} is not divisible into {cuts}"
            " chunks"
        )
    moe = MoEConfig((experts,) * dense.layers, mix.k, mix.routing, mix.first_routing)
    return dataclasses.replace(dense, d_ff=dense.d_ff // mix.chunks, moe=moe)
