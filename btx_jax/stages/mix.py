"""Mix: N dense checkpoints -> one checkpoint (step 0), by Branch-Train-MiX or one of its ablations;
one checkpoint copied N times is sparse upcycling. N adapters of one base -> one mixture of their
LoRA experts."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from btx_jax.architectures.tensors import Region, TensorId, slots
from btx_jax.checkpoints.adapter import from_tensors
from btx_jax.checkpoints.base import base_digest
from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    adapter_tensors,
    find_checkpoint,
    find_own_tokenizer,
    load_params,
    off_anchor,
    off_base,
    open_reader,
)
from btx_jax.checkpoints.checksums import write_sums
from btx_jax.checkpoints.router_statistics import FILE, About, Expert, Writer
from btx_jax.checkpoints.shardwise import assemble
from btx_jax.checkpoints.training_state import DIRECTORY, CheckpointMetadata, Checkpoints, together
from btx_jax.config.config import CheckpointConfig, Config, MixConfig
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.config.merges import COPY, MERGE_SETTINGS, REGMEAN
from btx_jax.config.mix_methods import AVERAGE, cut, owners
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.config.ridge import LOGISTIC, RIDGE
from btx_jax.data.prepare import check_text, prepare_by_all, resolve_tokenizer
from btx_jax.data.tokenizers import (
    Tokenizer,
    check_ids,
    copy_tokenizer,
    difference,
    load_tokenizer,
)
from btx_jax.errors import ConfigError, Mistakes
from btx_jax.mixing.averaging import Shared
from btx_jax.mixing.closed_form import (
    Fit,
    Hashed,
    Merging,
    by_logistic,
    by_ridge,
    mixture_layers,
    solve_routers,
    solve_shared,
)
from btx_jax.mixing.drop_upcycling import redrawn
from btx_jax.mixing.limits import limits, within
from btx_jax.mixing.lora import mix_lora
from btx_jax.mixing.mix import mix_branches, mix_params, restack
from btx_jax.mixing.router import normal_routers, uniform_routers
from btx_jax.mixing.split import expert_models
from btx_jax.mixing.states import Read
from btx_jax.mixing.streaming import is_averaged
from btx_jax.mixing.text import COUNTED, Rows, prepared_rows, token_counts
from btx_jax.models.llama import Params, abstract_params
from btx_jax.output import new_file, remove
from btx_jax.parallel.hosts import first_then_others, is_first, of_first, put, whole
from btx_jax.parallel.sharding import make_mesh, param_shardings
from btx_jax.rundir import claim, finish, look_up
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import counted

log = logging.getLogger(__name__)

_BASE = "config.mix.base"


def run(config: Config, workdir: Path) -> None:
    assert config.mix and config.mesh
    start = time.monotonic()
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return
    require_right(config)
    mix = config.mix
    # The sources may have been replaced since an interrupted attempt.
    first_then_others(remove, workdir / DIRECTORY)
    first_then_others(remove, workdir / FILE)
    named = {key: find_checkpoint(path, key) for key, path in _named(mix).items()}
    base = named.pop(_BASE, None)
    sources = list(named.values())
    first = sources[0]
    if any(source.metadata.model.lora for source in sources):
        mix_adapters(config, sources, workdir)
        finish(
            workdir,
            seconds=time.monotonic() - start,
            experts=[str(source.path) for source in sources],
        )
        return
    for other in off_base(sources):
        told = (
            f"{other.path} was trained on a different base from the branches, so they do"
            " not mix exactly"
        )
        log.warning("%s", told)
    read = named | ({_BASE: base} if base else {})
    tokenizers = [load_tokenizer(source.tokenizer) for source in read.values()]
    for key, tokenizer in zip(read, tokenizers, strict=True):
        if told := difference(tokenizers[0], tokenizer, first.metadata.model.vocab_size):
            raise ConfigError(
                f"{key}: {tokenizer.path} is a different tokenizer from"
                f" {tokenizers[0].path}: {told}"
            )
    found = {str(source.path): source.metadata.model for source in sources}
    dense_model = within(first.metadata.model, *limits(found))
    model = mixed_model(dense_model, mix)
    mesh = make_mesh(config.mesh.shape(jax.device_count()))
    dense = abstract_params(first.metadata.model)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.unbox(dense),
        param_shardings(dense, mesh),
    )

    def mixed(models):
        if model.has_anchor:
            return mix_branches(models)
        key = jax.random.key(config.rng_seed)
        *models, shared = models if mix.shared_expert else [*models, None]
        models = [params for params in models for _ in range(mix.copies)]
        if mix.method != AVERAGE:
            models = expert_models(models, mix.method, mix.chunks)
        runs = model.runs()
        moe_runs = [(name, length, spec.experts) for name, length, spec in runs if spec.experts]
        random_routers = uniform_routers if mix.router == "uniform" else normal_routers
        routers = random_routers(key, moe_runs, model.d_model, mix.router_std)
        lengths = [length for _, length, _ in runs]
        mixture = mix_params(
            [restack(params, lengths) for params in models],
            routers,
            None if shared is None else restack(shared, lengths),
        )
        if not mix.reinit:
            return mixture
        return redrawn(mixture, jax.random.fold_in(key, len(runs)), mix.reinit)

    into = "their mean"
    if model.moe:
        into = counted(model.moe.experts[0], "expert")
        into += " and a shared one" if mix.shared_expert else ""
        into += " and their anchor" if model.has_anchor else ""
    log.info("mixing %s into %s", counted(len(sources), "checkpoint"), into)
    with jax.set_mesh(mesh):
        mix_jit = jax.jit(mixed, out_shardings=param_shardings(abstract_params(model), mesh))
        params = mix_jit([load_params(source, abstract) for source in sources])
    history = together(source.metadata.history for source in read.values())
    with contextlib.ExitStack() as held:
        shared, statistics = _shared(mix, sources[: len(mix.experts)], base, config.rng_seed), None
        if shared:
            params = _replaced(params, model, shared.make, filter(is_averaged, slots(model)))
        if mix.router == RIDGE:
            statistics = held.enter_context(tempfile.TemporaryFile())
        if mix.text:
            solving = _Solving(config, model, tokenizers[0])
            if shared and mix.merge == REGMEAN:
                kept = held.enter_context(tempfile.TemporaryFile())
                places = [str(source.path) for source in sources[: len(mix.experts)]]
                solving.merge(shared, places, kept)
            params = solving.run(params, statistics)
        claim(workdir, config)
        if is_first():
            copy_tokenizer(tokenizers[0], workdir / "tokenizer")
            write_sums(workdir / "tokenizer")
            if statistics:
                with new_file(workdir / FILE) as partial, partial.open("wb") as file:
                    shutil.copyfileobj(statistics, file)
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    try:
        metadata = CheckpointMetadata(model, 0, history, huggingface=first.metadata.huggingface)
        checkpoints.save(metadata, params)
    finally:
        checkpoints.close()
    experts = sources[: len(mix.experts)]  # without the shared expert
    repeated = [str(source.path) for source in experts for _ in range(mix.copies)]
    owned = [repeated[number] for number in owners(mix.method, len(repeated), mix.chunks)]
    finish(
        workdir,
        seconds=time.monotonic() - start,
        experts=[*owned, *(["anchor"] if model.has_anchor else [])],
    )


def _shared(
    mix: MixConfig, experts: Sequence[Checkpoint], base: Checkpoint | None, seed: int
) -> Shared | None:
    """The merge of shared parameters, in float32; None for the mean."""
    if mix.merge == "mean":
        return None
    found = {str(source.path): source for source in experts}
    readers = [open_reader(source) for source in found.values()]
    own = open_reader(base) if base else readers[0]
    settings = {key: getattr(mix, key) for key in MERGE_SETTINGS.get(mix.merge, ())}
    merge, of_models = (mix.merge, readers) if mix.merge != COPY else ("mean", [own])
    return Shared(merge, settings, own, of_models, np.dtype(np.float32), seed)


def _texts(config: Config, tokenizer: Tokenizer, model: ModelConfig, limit: int) -> list[Rows]:
    """Text of each expert, with about the same number of tokens each. Raises ConfigError when the
    text's tokenizer is not the experts'."""
    assert config.mix and config.data
    reads = first_then_others(resolve_tokenizer, config.data, tokenizer.path.parent)
    if told := difference(tokenizer, reads, model.vocab_size):
        raise ConfigError(f"config.data.tokenizer: not the experts': {told}")
    texts = []
    for i, notation in enumerate(config.mix.text):
        key = f"config.mix.text[{i}]"
        domains = prepare_by_all(notation, config.data, reads, key)
        texts.append(prepared_rows(domains, limit))
        check_ids([int(texts[-1].tokens_RT.max())], model.vocab_size, key, reads)
    return texts


class _Solving:
    """Solves parameters from text, in every process: routers and, for regmean, the parameters that
    experts share."""

    def __init__(self, config: Config, model: ModelConfig, tokenizer: Tokenizer):
        assert config.mix
        self._config, self._mix, self._model, self._tokenizer = config, config.mix, model, tokenizer
        self._texts = _texts(config, tokenizer, model, config.mix.tokens)
        self._merging: Merging | None = None

    def merge(self, shared: Shared, places: Sequence[str], file: BinaryIO) -> None:
        """Prepare merging. places: path of each expert's checkpoint; experts with equal paths are
        the same model. file: storage for solved tensors."""
        distinct = list(dict.fromkeys(places))
        models = [distinct.index(place) for place in places]
        counted = _texts(self._config, self._tokenizer, self._model, COUNTED)
        self._merging = Merging(
            lambda tensor, seen: of_first(shared.make(tensor, seen)),
            list(zip(models, self._texts, strict=True)),
            [token_counts(rows, self._model.vocab_size) for rows in counted],
            file,
        )

    def run(self, params: Params, statistics: BinaryIO | None) -> Params:
        """The mixture with all solved parameters. statistics: for router=ridge, the file to which
        the sums that the routers are solved from are written."""
        model, merging = self._model, self._merging

        def read(tensor: TensorId) -> np.ndarray:
            if merging and tensor in merging.solved:
                return merging.solved[tensor]
            slot = slots(model)[tensor]
            leaf: Any = functools.reduce(lambda tree, key: tree[key], slot.path, params)
            return slot.to_theirs(whole(leaf[slot.indices]))

        if statistics:
            params = _with_routers(params, model, self._by_ridge(read, statistics))
        elif self._mix.router == LOGISTIC:
            params = _with_routers(params, model, self._rows(read, by_logistic))
        elif merging:
            solve_shared(model, read, [*enumerate(self._texts)], merging)
        if merging:
            params = _replaced(params, model, merging.solved.__getitem__, merging.solved)
        return params

    def _by_ridge(self, read: Read, statistics: BinaryIO) -> np.ndarray:
        mix, experts = self._mix, tuple(map(Expert, self._mix.experts))
        layers, sha256 = tuple(mixture_layers(self._model)), self._tokenizer.sha256
        about = About(experts, layers, self._model.d_model, sha256, mix.ridge, mix.tokens)
        writer, hashed = Writer(statistics, about), Hashed(read)
        rows = self._rows(hashed, by_ridge(mix.ridge, lambda n, sums: writer.write(n, *sums)))
        writer.finish(
            base_digest(hashed.of_expert(None)),
            [base_digest(hashed.of_expert(number)) for number in range(len(experts))],
        )
        return rows

    def _rows(self, read: Read, fit: Fit) -> np.ndarray:
        """Router rows [layers, experts, D], the same in every process. Logs how well they route."""
        texts = [*enumerate(self._texts)]
        solved = solve_routers(self._model, read, texts, fit, self._merging)
        for layer in mixture_layers(self._model):
            log.info(
                "router of layer %d: share of held-out tokens routed to their own domain's"
                " expert: %s",
                layer,
                ", ".join(f"{share:.1%}" for share in solved.own[layer]),
            )
        return of_first(solved.rows)


def _with_routers(params: Params, model: ModelConfig, rows: np.ndarray) -> Params:
    """The parameters with these router rows [layers, experts, D]."""
    start, routed = 0, dict(params)
    for name, length, spec in model.runs():
        if spec.experts:
            ffn = params[name]["ffn"]
            router_LDE = rows[start : start + length].swapaxes(1, 2)
            router = put(router_LDE, ffn["router"].sharding)
            routed[name] = {**params[name], "ffn": {**ffn, "router": router}}
        start += length
    return routed


class _Made:
    """A reader of a model whose tensors are computed on request."""

    def __init__(self, model: ModelConfig, make: Read):
        self.model, self.slots, self.read = model, slots(model), make
        self.dtypes = dict.fromkeys(self.slots, np.dtype(np.float32))

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        part = self.slots[tensor].to_ours(self.read(tensor))
        return part[tuple(slice(*along) for along in region)]

    def check(self) -> None:
        """Do nothing: the sources were checked when they were loaded."""


def _replaced(
    params: Params, model: ModelConfig, make: Read, tensors: Iterable[TensorId]
) -> Params:
    """The parameters with the given tensors replaced by the results of `make`. tensors: all
    tensors of each leaf that is replaced."""
    held = {tensor: slots(model)[tensor] for tensor in tensors}
    flat = flatten_dict(params)
    abstract = {
        path: jax.ShapeDtypeStruct(flat[path].shape, flat[path].dtype, sharding=flat[path].sharding)
        for path in {slot.path for slot in held.values()}
    }
    made = assemble(_Made(model, make), unflatten_dict(abstract), held)
    return dict(unflatten_dict(flat | flatten_dict(made)))


def _named(mix: MixConfig) -> dict[str, str]:
    """Config key -> the checkpoint that it names: the experts, the shared one, the base."""
    named = {f"config.mix.experts[{i}]": path for i, path in enumerate(mix.experts)}
    others = {"config.mix.shared_expert": mix.shared_expert, _BASE: mix.base}
    return named | {key: path for key, path in others.items() if path}


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.mix and config.mesh
    models: dict[str, ModelConfig | None] = {}
    beside_anchors: dict[str, Checkpoint] = {}
    for key, path in _named(config.mix).items():
        with mistakes.gather():
            if path in coming:
                models[key] = coming[path]
                continue
            found = find_checkpoint(path, key)
            models[key] = found.metadata.model
            if found.metadata.model.has_anchor:
                beside_anchors[key] = found
    with mistakes.gather():
        others = off_anchor(list(beside_anchors.values()))
        for key, found in beside_anchors.items():
            if found in others:
                mistakes.add(
                    f"{key}: {found.path} was trained with a different anchor from"
                    f" {next(iter(beside_anchors.values())).path}; only branches of one base"
                    " can be mixed"
                )
    with mistakes.gather():
        config.mesh.shape(jax.device_count())
    if config.data:
        with mistakes.gather():
            texts = enumerate(config.mix.text)
            check_text(config.data, [(f"config.mix.text[{i}]", text) for i, text in texts])
    known = {key: model for key, model in models.items() if model is not None}
    mixed = None
    for told in _asked_of_branches(config.mix) if any(m.is_branch for m in known.values()) else ():
        mistakes.add(told)
    if known and not any(model.lora for model in known.values()):
        name, first = next(iter(known.items()))
        for key, model in known.items():
            other = within(model, first.context, first.window)
            if changed := differences(to_dict(first), to_dict(other)):
                mistakes.add(
                    f"{key}: a different model from {name.removeprefix('config.mix.')}:"
                    f" {'; '.join(map(str, changed))}"
                )
        if first.moe and not first.is_branch:
            mistakes.add(
                f"{name}: {_named(config.mix)[name]} is already a mixture; mix dense checkpoints"
            )
        else:
            with mistakes.gather():
                named = {str(i): model for i, model in known.items()}
                mixed = mixed_model(within(first, *limits(named, warn=False)), config.mix)
    if mixed and config.mix.text and config.data:
        length = config.data.sequence_length
        if length > mixed.context:
            mistakes.add(
                f"config.data.sequence_length={length}: longer than the context of"
                f" {mixed.context}; lower it"
            )
    return mixed


def _asked_of_branches(mix: MixConfig) -> Iterator[str]:
    """Yield a message for each setting that does not apply to branches with an anchor, which have
    their own router rows."""
    only = {
        "method": "btx",
        "copies": 1,
        "merge": "mean",
        "router": "normal",
        "shared_expert": "",
    }
    for key, value in only.items():
        if (given := getattr(mix, key)) != value:
            yield (
                f"config.mix.{key}={given!r}: branches trained with an anchor are combined"
                " unchanged, with their own router rows; leave it out"
            )


def mix_adapters(config: Config, sources: list[Checkpoint], workdir: Path) -> None:
    """Mix LoRA experts of one base. Gates that were trained for finished experts (lora.gating
    sigmoid) become router rows, compared by cosine. Raises ConfigError when the adapters differ in
    base, rank, alpha or targets, or the config has a setting that adapters do not support."""
    mix, first = config.mix, sources[0].metadata
    assert mix
    asked = (
        mix.method,
        mix.copies,
        mix.routing,
        mix.first_routing,
        mix.router,
        mix.merge,
        mix.shared_expert,
    )
    if asked != ("btx", 1, "top_k", "", "normal", "mean", ""):
        raise ConfigError(
            "config.mix: LoRA experts are mixed with method='btx', routing='top_k',"
            " router='normal', merge='mean', copies=1 and without shared_expert only"
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
                f"config.mix.experts[{i}]: adapters and whole models cannot be mixed with each"
                " other; merge the adapters into their base first"
            )
        if metadata.base.digest != first.base.digest:
            raise ConfigError(
                f"config.mix.experts[{i}]: {source.path} was trained on a different base from"
                " experts[0]"
            )
        differ = {key: getattr(metadata.model.lora, key) for key in ("rank", "alpha", "targets")}
        if changed := differences({key: getattr(first.model.lora, key) for key in differ}, differ):
            raise ConfigError(
                f"config.mix.experts[{i}]: LoRA experts differ from those of experts[0]:"
                f" {'; '.join(map(str, changed))}"
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
        "mixing %s into %s a layer at most, %s",
        counted(len(sources), "adapter"),
        counted(max(counts), "LoRA expert"),
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
    """The model of the mixture. Raises ConfigError when d_ff cannot be split as configured."""
    if mix.method == AVERAGE:
        return dense
    if dense.moe:  # a branch with its anchor
        experts = (len(mix.experts),) * dense.layers
        moe = MoEConfig(experts, mix.k, mix.routing, mix.first_routing, anchor=True)
        return dataclasses.replace(dense, moe=moe)
    try:
        made = cut(mix.method, len(mix.experts) * mix.copies, mix.chunks, dense.d_ff)
    except ConfigError as error:
        raise ConfigError(f"config.mix.{error}") from None
    moe = MoEConfig(
        (made.experts,) * dense.layers,
        mix.k,
        mix.routing,
        mix.first_routing,
        shared_d_ff=dense.d_ff if mix.shared_expert else 0,
        shared_gate=bool(mix.shared_expert),
    )
    return dataclasses.replace(dense, d_ff=made.d_ff, moe=moe)
