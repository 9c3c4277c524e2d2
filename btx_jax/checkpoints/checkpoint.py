"""A model on disk in any format: a run's own checkpoint (Orbax) or a Hugging Face directory."""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from btx_jax import buckets, hub
from btx_jax.architectures.folding import folded, folding
from btx_jax.architectures.layout import rows
from btx_jax.architectures.tensors import Reader, Slot, TensorId, slots
from btx_jax.architectures.values import cast, is_finite
from btx_jax.checkpoints import adapter, safetensors_files
from btx_jax.checkpoints.base import base_digest, require_digest, tensor_digest
from btx_jax.checkpoints.branch import AnchorReader, BranchReader
from btx_jax.checkpoints.checksums import check_sums, read_sums, write_sums
from btx_jax.checkpoints.huggingface import (
    HuggingFaceReader,
    HuggingFaceWriter,
    is_huggingface,
    read_config,
    read_kept,
    written_as,
)
from btx_jax.checkpoints.shardwise import assemble
from btx_jax.checkpoints.training_state import (
    DIRECTORY,
    Base,
    CheckpointMetadata,
    History,
    StepReader,
    StepWriter,
    elsewhere,
    history_from_json,
    named_leaves,
    quiet,
    read_metadata,
    restore_params,
    steps_of,
    stored,
)
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import Tokenizer, copy_tokenizer, find_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.hub_names import PROTOCOL, may_be_named, origin, title
from btx_jax.models.leaves import is_anchor, is_feed_forward, stays_float32
from btx_jax.models.llama import Params, abstract_params
from btx_jax.models.lora import join, partition
from btx_jax.output import new_directory
from btx_jax.parallel.sharding import param_shardings
from btx_jax.paths import refuse_links_out, to_path
from btx_jax.progress import bar
from btx_jax.rundir import has_begun, has_finished, recorded_results

log = logging.getLogger(__name__)

HISTORY = "btx_jax.history"  # key of the History, as JSON, in the headers of exports
BEST = "best"  # accepted in place of a step number; also a key of a run's results
SHOWN = 12  # checkpoints of a directory to list
AHEAD = 2  # tensors to make ahead of the one being written

DTYPES = {dtype.name: dtype for dtype in safetensors_files.DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The location and description of one stored model; its parameters are not read."""

    path: Path
    metadata: CheckpointMetadata
    is_huggingface: bool = False
    is_adapter_directory: bool = False

    def identity(self) -> str:
        """A hash of its files' names, sizes and modification times, which changes when the model is
        trained further, replaced or converted again. For a model on the Hub, its name and
        commit."""
        if found := origin(self.path):
            return str(found)
        if buckets.is_on_bucket(self.path):
            told = buckets.stamps(self.path)
        else:
            files = sorted(file for file in self.path.rglob("*") if file.is_file())
            told = [
                [str(file.relative_to(self.path)), file.stat().st_size, file.stat().st_mtime_ns]
                for file in files
            ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The model's name in model cards."""
        return (
            title(self.path)
            if self.is_huggingface or self.is_adapter_directory
            else self.path.parent.parent.name
        )

    @functools.cached_property
    def tokenizer(self) -> Path:
        """The directory that contains its tokenizer."""
        return (
            self.path
            if self.is_huggingface or self.is_adapter_directory
            else self.path.parent.parent / "tokenizer"
        )


def find_checkpoint(path: str | Path, key: str = "checkpoint") -> Checkpoint:
    """Find a checkpoint: a run's working directory (its last step), the directory of a step
    (`checkpoints/best`: the one kept by CheckpointConfig.best), a Hugging Face directory or an
    adapter directory. Raises UserError for anything else, and for links that lead out of it."""
    found = _find(path, key)
    refuse_links_out(found.tokenizer)  # all files of a Hugging Face or adapter directory
    return found


def _find(path: str | Path, key: str) -> Checkpoint:
    quiet()
    named = str(path)
    try:
        path = _best(_again(hub.resolve(named, key).resolve(), key), key)
        buckets.require(path, key)
        if not path.exists():
            cure = (
                f"; for a repository of the Hub write {PROTOCOL}{named}"
                if may_be_named(named)
                else ""
            )
            raise UserError(f"{key}: {path} does not exist{cure}")
        for directory in (path, path.parent.parent):  # a run or one of its steps
            buckets.require_whole(directory, key)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name too long, a NUL in it, a loop of links
        raise UserError(f"{key}: {str(path)[:200]!r}: {error}") from error
    # Tensors are checked when they are read.
    sums = [name for name in read_sums(path) if not name.endswith(".safetensors")]
    if origin(path):  # of a snapshot, only the files that are needed are downloaded
        sums = [name for name in sums if (path / name).exists()]
    check_sums(path, sums)
    if is_huggingface(path):
        refuse_links_out(path)  # before any of them is read
        metadata = CheckpointMetadata(
            read_config(path), 0, _history(path), huggingface=read_kept(path)
        )
        return Checkpoint(path, metadata, is_huggingface=True)
    if adapter.is_adapter_directory(path):
        return Checkpoint(path, adapter.read_metadata(path), is_adapter_directory=True)
    if (path / DIRECTORY).is_dir():
        steps = steps_of(path / DIRECTORY)
        if not steps:
            raise UserError(f"{key}: {path} has no complete checkpoint yet")
        if has_begun(path) and not has_finished(path):
            log.warning("%s: %s has not finished; using step %d", key, path, max(steps))
        path = path / DIRECTORY / str(max(steps))
    if not (path / "params").is_dir() or not (path / "about").is_dir():
        if within := _checkpoints_in(path):
            listed = ", ".join(f"{named.rstrip('/')}/{name}" for name in within[:SHOWN])
            more = ", ..." if within[SHOWN:] else ""
            raise UserError(
                f"{key}: {path} is not a checkpoint but contains some; name one: {listed}{more}"
            )
        if has_begun(path):
            raise UserError(f"{key}: {path} is a run that has not saved a checkpoint yet")
        raise UserError(
            f"{key}: {path} is not a checkpoint; name a run's --workdir, its {DIRECTORY}/STEP, a"
            f" Hugging Face directory (config.json) or an adapter ({adapter.ABOUT})"
        )
    found = Checkpoint(path, read_metadata(path))
    check_sums(found.tokenizer)
    return found


def _checkpoints_in(directory: Path) -> list[str]:
    """The checkpoints in a directory, as paths relative to it: runs, such as a pipeline's stages,
    and models, such as their export."""

    def is_one(path: Path) -> bool:
        if (path / DIRECTORY).is_dir():
            return bool(steps_of(path / DIRECTORY))
        return is_huggingface(path) or adapter.is_adapter_directory(path)

    found = (path for pattern in ("*", "*/model") for path in directory.glob(pattern))
    return sorted(str(path.relative_to(directory)) for path in found if is_one(path))


def _best(path: Path, key: str) -> Path:
    """The step that RUN/checkpoints/best stands for; any other path is returned unchanged."""
    run = path.parent.parent
    if (path.parent.name, path.name) != (DIRECTORY, BEST) or not run.is_dir():
        return path
    results = recorded_results(run)
    if results is None:
        raise UserError(
            f"{key}: {path}: only known once {run} has finished; until then name a step of"
            f" {path.parent}"
        )
    if BEST not in results:
        raise UserError(
            f"{key}: {path}: none of the steps that {run} kept was evaluated; name one of"
            f" {path.parent}"
        )
    return path.parent / str(results[BEST]["step"])


def _again(path: Path, key: str) -> Path:
    """The path itself; if it is inside a snapshot of the Hub's cache and the cache has been
    emptied, the snapshot is downloaded again."""
    if path.exists() or not (found := origin(path)):
        return path
    return hub.resolve(f"{PROTOCOL}{found}", key)


def _history(directory: Path) -> History:
    """History of a Hugging Face directory. btx_jax's export writes it into the headers of the
    tensor files; other tools that write models do not preserve it."""
    files = sorted(directory.glob("model*.safetensors"))
    told = {safetensors_files.SafetensorsFile(file).metadata.get(HISTORY) for file in files}
    text = told.pop() if len(told) == 1 else None
    if text is None:
        return elsewhere(directory)
    try:
        return history_from_json(json.loads(text), files[0])
    except (ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{files[0]}: damaged history: {error}") from error


def open_reader(checkpoint: Checkpoint) -> Reader:
    """Open a checkpoint for reading. Raises UserError that lists everything wrong with the
    checkpoint except its values, and for LoRA experts, which are not a whole model."""
    metadata = checkpoint.metadata
    if metadata.model.lora:
        raise UserError(
            f"{checkpoint.path} holds LoRA experts, not a whole model; merge them first: python -m"
            " btx_jax adapter merge"
        )
    if checkpoint.is_huggingface:
        return HuggingFaceReader(checkpoint.path, metadata.model)
    reader = StepReader(checkpoint.path)
    if metadata.base is None:
        return reader
    under = _find_base(metadata.base, metadata.model, checkpoint.path)
    base = Base(str(under.path), metadata.base.digest)
    return BranchReader(reader, _as_base(under, metadata.model), base, checkpoint.path)


def reads_by_leaf(readers: Iterable[Reader]) -> bool:
    """Whether one of the readers reads fewer bytes when tensors are requested leaf by leaf."""
    return any(getattr(reader, "by_leaf", False) for reader in readers)


def load_params(checkpoint: Checkpoint, abstract: Any = None) -> Params:
    """Load all parameters, with the shardings and dtypes of `abstract`, or by default in host
    memory as float32.

    Raises UserError that lists every way in which the checkpoint does not match its own model.
    """
    if abstract is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        expected = nn.unbox(abstract_params(checkpoint.metadata.model))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), expected
        )
    metadata = checkpoint.metadata
    if metadata.base:
        under = partition(abstract, metadata.holds)[1]
        base, _ = load_base(metadata.base, metadata.model, under, checkpoint.path)
        return join(_load_stored(checkpoint, abstract), base)
    if not checkpoint.is_huggingface:
        return restore_params(checkpoint.path, metadata, abstract)
    return load_part(checkpoint, abstract)


def load_part(checkpoint: Checkpoint, abstract: Any) -> Params:
    """Load the parameters named by `abstract` from a whole model, with its shardings."""
    reader = open_reader(checkpoint)
    return assemble(reader, abstract, _slots_of(abstract, checkpoint.metadata.model))


def _slots_of(abstract: Any, model: ModelConfig) -> dict[TensorId, Slot]:
    """The tensors that make up these parameters."""
    paths = flatten_dict(abstract).keys()
    return {tensor: slot for tensor, slot in slots(model).items() if slot.path in paths}


def load_for_inference(checkpoint: Checkpoint, mesh: Mesh, dtype: str) -> Params:
    """Load a model for inference, sharded over the mesh: matmul operands in `dtype`, everything
    else in float32."""
    boxed = abstract_params(checkpoint.metadata.model)

    def place(path: Any, x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, jnp.float32 if stays_float32(path) else dtype, sharding=sharding
        )

    return load_params(
        checkpoint,
        jax.tree_util.tree_map_with_path(place, nn.unbox(boxed), param_shardings(boxed, mesh)),
    )


def _load_stored(checkpoint: Checkpoint, abstract: Any) -> Params:
    """The parameters stored in the checkpoint itself, without its base, with the shardings of
    `abstract`."""
    metadata = checkpoint.metadata
    if not checkpoint.is_adapter_directory:
        return restore_params(checkpoint.path, metadata, abstract)
    tree = adapter.read_directory(checkpoint.path, metadata.model)
    return jax.tree.map(
        lambda x, a: jax.make_array_from_callback(a.shape, a.sharding, lambda i: x[i]),
        tree,
        stored(abstract, metadata),
    )


def adapter_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The LoRA experts of a checkpoint, named and laid out as in an adapter directory."""
    model = checkpoint.metadata.model
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = nn.unbox(abstract_params(model))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
    )
    return adapter.to_tensors(model, _load_stored(checkpoint, abstract))


def load_base(
    base: Base, model: ModelConfig, abstract: Any, whose: Path | str
) -> tuple[Params, Base]:
    """Load the base of LoRA experts or of a branch: (the parameters named by `abstract`, with its
    shardings and dtypes, in the runs of `model`; `base` with its digest).

    The digest is the sha256 over the sorted lines `NAME SHA256` for every tensor that is used: its
    name (as TensorId prints it) and the hash of its values in Hugging Face's layout as
    little-endian float32. It is the same for a Hugging Face directory and its conversion.

    Raises UserError when the base does not exist, is another model, or base.digest is set and
    differs.
    """
    found = _find_base(base, model, whose)
    hashes: dict[TensorId, str] = {}
    params = assemble(_as_base(found, model), abstract, _slots_of(abstract, model), hashes)
    held = Base(str(found.path), base_digest(hashes))
    if base.digest:
        require_digest(held, base.digest, whose)
    return params, held


def _as_base(found: Checkpoint, model: ModelConfig) -> Reader:
    """A reader of the base that presents only what `model` uses."""
    reader = open_reader(found)
    return AnchorReader(reader, model) if model.moe and not found.metadata.model.moe else reader


def _find_base(base: Base, model: ModelConfig, whose: Path | str) -> Checkpoint:
    """Find the base at base.path, or at its new place if it was moved together with the checkpoint
    that needs it. Raises UserError when it does not exist or is another model."""
    path = base.path
    if not to_path(path, "base").exists() and not origin(path):
        path = _moved(path, to_path(str(whose), "base"))
    if not path:
        cure = "restore it there, or at its former location relative to this run"
        if model.lora:
            cure = (
                "restore it, or export the adapter and set base.path to the new location in"
                f" its {adapter.ABOUT}"
            )
        raise UserError(f"{whose}: its base {base.path} is missing; {cure} (the digest is checked)")
    found = find_checkpoint(path, f"{whose}: its base")
    under = model.dense() if model.has_anchor and not model.lora else model.base()
    if changed := differences(to_dict(under), to_dict(found.metadata.model)):
        raise UserError(
            f"{whose}: its base {base.path} is a different model: {'; '.join(map(str, changed))}"
        )
    return found


def _moved(path: str, whose: Path) -> str:
    """Look for a tail of `path` below the directories around `whose`: the nearest directory first,
    then the longest tail; "" if there is none. A step is recognised only together with its run."""
    parts = to_path(path, "base").parts
    least = 3 if parts[-2:-1] == (DIRECTORY,) else 1
    ends = [parts[start:] for start in range(1, len(parts) - least + 1)]
    places = (around.joinpath(*end) for around in whose.parents for end in ends)
    return next((str(place) for place in places if place.exists()), "")


def base_of(checkpoint: Checkpoint) -> Base:
    """A whole model as the base of LoRA experts; reads one tensor at a time."""
    return Base(str(checkpoint.path), _digest_of(checkpoint, lambda path: True))


def off_base(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Of models that include branches of a base, those that differ from the first branch's base in
    the parameters that branches keep. Mixing with these models is not exact."""
    digests = [c.metadata.base.digest for c in checkpoints if c.metadata.base]
    if not digests:
        return []

    def digest_of(checkpoint: Checkpoint) -> str:
        base = checkpoint.metadata.base
        return base.digest if base else _digest_of(checkpoint, lambda p: not is_feed_forward(p))

    return [checkpoint for checkpoint in checkpoints if digest_of(checkpoint) != digests[0]]


def off_anchor(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Of models with an anchor, those whose base or anchor differs from the first one's."""
    bases = [checkpoint.metadata.base for checkpoint in checkpoints]
    if all(bases):
        digests = [base.digest for base in bases if base]
    else:
        digests = [_digest_of(checkpoint, is_anchor) for checkpoint in checkpoints]
    pairs = zip(checkpoints, digests, strict=True)
    return [checkpoint for checkpoint, digest in pairs if digest != digests[0]]


def _digest_of(checkpoint: Checkpoint, wanted: Callable[[tuple[str, ...]], bool]) -> str:
    """Digest as in `load_base`, over the tensors of the wanted leaves."""
    reader = open_reader(checkpoint)
    tensors = [tensor for tensor, slot in reader.slots.items() if wanted(slot.path)]
    hashes = {
        tensor: tensor_digest(reader.read(tensor))
        for tensor in bar(tensors, desc="digest of the base", unit="tensor", leave=False)
    }
    reader.check()
    return base_digest(hashes)


def find_own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer stored with a checkpoint. Without one, returns None with a warning: weights
    alone can be converted and mixed.

    Raises UserError when it is damaged.
    """
    try:
        file = find_tokenizer(checkpoint.tokenizer)
    except UserError:
        log.warning("%s: no tokenizer found; only the weights are written", checkpoint.path)
        return None
    return load_tokenizer(file)


def write_checkpoint(
    target: Path,
    as_huggingface: bool,
    model: ModelConfig,
    dtypes: Mapping[TensorId, np.dtype],
    make_tensor: Callable[[TensorId], np.ndarray],
    tokenizer: Tokenizer | None,
    *,
    history: History,
    huggingface: Mapping[str, Any],
    card: str,
    check: Callable[[], None],
    verb: str,
    inspect: Callable[[Path], None] = lambda written: None,
    by_leaf: bool = False,
) -> None:
    """Write a checkpoint into a new directory, completely or not at all: `make_tensor(tensor)` for
    every tensor of the model, one at a time, cast to dtypes[tensor].

    The next tensors are made while one is written. `check` runs after all have been made, `inspect`
    on the finished directory before it is renamed; if either raises, nothing is left. Raises
    UserError when the target exists or cannot be written, when a tensor is not finite, or when the
    format cannot hold the model.
    """
    own, places = slots(model), slots(model)
    if as_huggingface:
        family, written = written_as(model, huggingface)
        if written.norm != model.norm:
            make_tensor, own = folding(make_tensor, model), slots(folded(model))
        model, places = written, slots(written)
        usual = max(dtypes.values(), key=list(dtypes.values()).count)
        dtypes = {tensor: dtypes.get(tensor, usual) for tensor in places}
        # Tensors that share one tensor of a file must be made consecutively.
        by_leaf = by_leaf and all(
            len(part) == 1 for row in rows(family, model) for part in row.tensors
        )

    def make(tensor: TensorId) -> tuple[np.ndarray, bool]:
        if tensor not in own:
            return np.zeros(places[tensor].shape, dtypes[tensor]), True
        array = cast(tensor, make_tensor(tensor), dtypes[tensor])
        return array, not array.flags.writeable or is_finite(
            array
        )  # a reader has checked read-only arrays

    tensors, bad_values = list(places), []
    if by_leaf:
        tensors.sort(key=lambda tensor: places[tensor].path)  # stable: layers stay in order
    dtypes = {tensor: dtypes[tensor] for tensor in tensors}
    told = {HISTORY: json.dumps(to_dict(history), sort_keys=True)} if history else {}
    with new_directory(target) as partial:
        writer = (
            HuggingFaceWriter(partial, model, family, dtypes, metadata=told)
            if as_huggingface
            else StepWriter(partial, model, dtypes)
        )
        with ThreadPoolExecutor(AHEAD) as workers:
            made = collections.deque(workers.submit(make, tensor) for tensor in tensors[:AHEAD])
            try:
                progress = bar(tensors, desc=verb, unit="tensor")
                for number, tensor in enumerate(progress):
                    array, finite = made.popleft().result()
                    if not finite:
                        bad_values.append(str(tensor))
                    if number + AHEAD < len(tensors):
                        made.append(workers.submit(make, tensors[number + AHEAD]))
                    writer.write(tensor, array)
            finally:
                workers.shutdown(cancel_futures=True)
        check()
        if bad_values:
            raise UserError(
                f"NaN or infinity would be written to {', '.join(bad_values[:5])}, although the"
                " sources contain none"
            )
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial if as_huggingface else partial / "tokenizer")
        if isinstance(writer, HuggingFaceWriter):
            bos, eos = (tokenizer.bos, tokenizer.eos) if tokenizer else (None, None)
            writer.finish(huggingface, bos, eos, card)
            write_sums(partial, writer.sha256)
        else:
            writer.finish(CheckpointMetadata(model, 0, history, huggingface=huggingface))
            (partial / "README.md").write_text(card, encoding="utf-8")
            if tokenizer is not None:
                write_sums(partial / "tokenizer")
        inspect(partial)


def digest(params: Params) -> str:
    """sha256 over all parameters in the order of their paths: path, dtype, shape and bytes
    (little-endian, C order) of each."""
    leaves = named_leaves(params)
    total = hashlib.sha256()
    for name in bar(sorted(leaves), desc="digest", unit="array", leave=False):
        array = np.ascontiguousarray(np.asarray(leaves[name]))
        total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
