"""A model on disk, whatever its format: a run's own checkpoint (Orbax) or a Hugging Face
directory."""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from tqdm import tqdm

from btx_jax.checkpoints import adapter, safetensors_files
from btx_jax.checkpoints.checksums import check_sums, read_sums, write_sums
from btx_jax.checkpoints.huggingface import (
    HuggingFaceReader,
    HuggingFaceWriter,
    Slot,
    is_finite,
    is_huggingface,
    read_config,
    read_kept,
    slots,
)
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
    stored,
)
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import Tokenizer, copy_tokenizer, find_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.models.llama import Params, abstract_params
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.output import CONFIG, DONE, new_directory
from btx_jax.parallel.sharding import param_shardings
from btx_jax.paths import expand, refuse_links_out

log = logging.getLogger(__name__)

HISTORY = "btx_jax.history"  # in the headers of exports: the History as JSON
AHEAD = 2  # tensors being made while one is written

DTYPES = {dtype.name: dtype for dtype in safetensors_files.DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One model's directory, found and described but not read."""

    path: Path
    metadata: CheckpointMetadata
    is_huggingface: bool = False
    is_adapter_directory: bool = False

    def identity(self) -> str:
        """A hash of its files' names, sizes and times: another one where it was trained on,
        replaced or converted anew."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        told = [
            [str(file.relative_to(self.path)), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @functools.cached_property
    def tokenizer(self) -> Path:
        """The directory that holds it."""
        return (
            self.path
            if self.is_huggingface or self.is_adapter_directory
            else self.path.parent.parent / "tokenizer"
        )


class Reader(Protocol):
    """Tensors one at a time, under their Hugging Face names and in that layout (a Linear is [out,
    in])."""

    model: ModelConfig
    slots: dict[str, Slot]
    dtypes: dict[str, np.dtype]

    def read(self, name: str) -> np.ndarray:
        """Read-only: its values have been looked at, and nobody can change them."""
        ...

    def check(self) -> None:
        """Raises UserError when a tensor that was read held NaN or infinity."""
        ...


def find_checkpoint(path: str | Path, key: str = "checkpoint") -> Checkpoint:
    """A run's working directory (its last step), one step's directory, a Hugging Face directory or
    an adapter directory. Raises UserError if none of these, and for links out of it."""
    found = _find(path, key)
    refuse_links_out(found.tokenizer)  # of a Hugging Face or adapter directory, all of it
    return found


def _find(path: str | Path, key: str) -> Checkpoint:
    quiet()
    named = path
    try:
        path = Path(expand(str(path), key)).resolve()
        if not path.exists():
            hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(named)) is not None
            cure = (
                f"; if it is a model of the Hugging Face Hub: hf download {named} --local-dir"
                f" {named}"
                if hub
                else ""
            )
            raise UserError(f"{key}: {path} does not exist{cure}")
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name too long, a NUL in it, a loop of links
        raise UserError(f"{key}: {str(path)[:200]!r}: {error}") from error
    # Tensors are checked where they are read.
    check_sums(path, [name for name in read_sums(path) if not name.endswith(".safetensors")])
    if is_huggingface(path):
        refuse_links_out(path)  # before the first of them is read
        metadata = CheckpointMetadata(
            read_config(path), 0, _history(path), huggingface=read_kept(path)
        )
        return Checkpoint(path, metadata, is_huggingface=True)
    if adapter.is_adapter_directory(path):
        return Checkpoint(path, adapter.read_metadata(path), is_adapter_directory=True)
    if (path / DIRECTORY).is_dir():
        steps = [int(p.name) for p in (path / DIRECTORY).iterdir() if p.name.isdigit()]
        if not steps:
            raise UserError(f"{key}: {path} holds no finished checkpoint yet")
        if (path / CONFIG).exists() and not (path / DONE).exists():
            log.warning("%s: %s has not finished; step %d is taken", key, path, max(steps))
        path = path / DIRECTORY / str(max(steps))
    if not (path / "params").is_dir() or not (path / "about").is_dir():
        raise UserError(
            f"{key}: {path} is no checkpoint; name a run's --workdir, its {DIRECTORY}/STEP, a"
            f" Hugging Face directory (config.json) or an adapter ({adapter.ABOUT})"
        )
    found = Checkpoint(path, read_metadata(path))
    check_sums(found.tokenizer)
    return found


def shortest_context(checkpoints: Sequence[Checkpoint]) -> int:
    """How long what is made of these may be used: no longer than each of them."""
    contexts = {checkpoint.path: checkpoint.metadata.model.context for checkpoint in checkpoints}
    least = min(contexts, key=lambda path: contexts[path])
    if contexts[least] < max(contexts.values()):
        log.warning("the context is %d, that of %s, the shortest", contexts[least], least)
    return contexts[least]


def _history(directory: Path) -> History:
    """Of a Hugging Face directory: what our export wrote into the headers of its tensors' files,
    which no other tool keeps when it writes a model."""
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
    """Raises UserError listing everything that is wrong with the checkpoint, short of its values;
    and for LoRA experts, which have no tensors of a whole model."""
    if checkpoint.metadata.base:
        raise UserError(
            f"{checkpoint.path} holds LoRA experts, no whole model; merge them first: python -m"
            " btx_jax adapter merge"
        )
    return (
        HuggingFaceReader(checkpoint.path, checkpoint.metadata.model)
        if checkpoint.is_huggingface
        else StepReader(checkpoint.path)
    )


def reads_by_leaf(readers: Iterable[Reader]) -> bool:
    """Whether one of them reads least when tensors are asked for leaf by leaf."""
    return any(isinstance(reader, StepReader) and reader.by_leaf for reader in readers)


def load_params(checkpoint: Checkpoint, abstract: Any = None) -> Params:
    """The parameters, onto the shardings of `abstract`, or all in the host's memory. float32 unless
    `abstract` says otherwise.

    Raises UserError listing everything that does not fit the checkpoint's own model.
    """
    if abstract is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        expected = nn.unbox(abstract_params(checkpoint.metadata.model))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), expected
        )
    if checkpoint.metadata.base:
        base, _ = load_base(
            checkpoint.metadata.base,
            checkpoint.metadata.model,
            partition(abstract, is_adapter)[1],
            checkpoint.path,
        )
        return join(load_adapter(checkpoint, abstract), base)
    if not checkpoint.is_huggingface:
        return restore_params(checkpoint.path, checkpoint.metadata.model, abstract)
    reader = HuggingFaceReader(checkpoint.path, checkpoint.metadata.model)
    params = assemble(reader, abstract, reader.slots)
    reader.check()
    return params


def load_for_inference(checkpoint: Checkpoint, mesh: Mesh, dtype: str) -> Params:
    """The parameters of a model that is not trained, spread over the mesh: what matmuls read in
    `dtype`, all else in float32."""
    boxed = abstract_params(checkpoint.metadata.model)

    def place(path: Any, x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        in_float32 = path[-1].key in ("scale", "router", "embedding")
        return jax.ShapeDtypeStruct(
            x.shape, jnp.float32 if in_float32 else dtype, sharding=sharding
        )

    return load_params(
        checkpoint,
        jax.tree_util.tree_map_with_path(place, nn.unbox(boxed), param_shardings(boxed, mesh)),
    )


def load_adapter(checkpoint: Checkpoint, abstract: Any) -> Params:
    """The LoRA experts of a checkpoint alone, onto the shardings of `abstract`."""
    model = checkpoint.metadata.model
    if not checkpoint.is_adapter_directory:
        return restore_params(checkpoint.path, model, abstract)
    tree = adapter.read_directory(checkpoint.path, model)
    return jax.tree.map(
        lambda x, a: jax.make_array_from_callback(a.shape, a.sharding, lambda i: x[i]),
        tree,
        stored(abstract, model),
    )


def adapter_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The LoRA experts of a checkpoint, named and laid out as in an adapter directory."""
    model = checkpoint.metadata.model
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = nn.unbox(abstract_params(model))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
    )
    return adapter.to_tensors(model, load_adapter(checkpoint, abstract))


def load_base(
    base: Base, model: ModelConfig, abstract: Any, whose: Path | str
) -> tuple[Params, Base]:
    """The model under LoRA experts onto the shardings and into the dtypes of `abstract`, in the
    runs of `model`; and base with its digest.

    digest: sha256 over the lines `NAME SHA256`, sorted, of every tensor's name and values in
    Hugging Face's layout, as little-endian
    float32: the same for a Hugging Face directory and for its conversion.

    Raises UserError when there is no such checkpoint, it is another model, or base.digest is set
    and not that of its values.
    """
    if not Path(base.path).exists():
        raise UserError(
            f"{whose}: its base {base.path} is gone; put it there again, or export the adapter and"
            f" write the new place into base.path of its {adapter.ABOUT} (the digest is checked)"
        )
    found = find_checkpoint(base.path, f"{whose}: its base")
    reader = open_reader(found)
    if changed := differences(to_dict(model.base()), to_dict(found.metadata.model)):
        raise UserError(f"{whose}: its base {base.path} is another model: {'; '.join(changed)}")
    hashes: dict[str, str] = {}
    params = assemble(reader, abstract, slots(model), hashes)
    reader.check()
    digest = base_digest(hashes)
    if base.digest and base.digest != digest:
        raise UserError(
            f"{whose}: was trained on a base with digest {base.digest[:16]}..., but {base.path} has"
            f" {digest[:16]}...: other weights; put the right base there"
        )
    return params, Base(str(found.path), digest)


def base_digest(hashes: Mapping[str, str]) -> str:
    """That of `load_base`. hashes: tensor name -> sha256 of its values."""
    return hashlib.sha256(
        "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()
    ).hexdigest()


def base_of(checkpoint: Checkpoint) -> Base:
    """A whole model as the base of LoRA experts, one tensor in memory at a time."""
    reader = open_reader(checkpoint)
    hashes = {
        name: hashlib.sha256(np.ascontiguousarray(reader.read(name), "<f4").data).hexdigest()
        for name in reader.slots
    }
    reader.check()
    return Base(str(checkpoint.path), base_digest(hashes))


def assemble(
    reader: Reader, abstract: Any, slots: Mapping[str, Slot], hashes: dict[str, str] | None = None
) -> Params:
    """Our tree from a reader's tensors, one whole leaf in host memory at a time. hashes: gets
    sha256 of each tensor's float32 values."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, slot in slots.items():
        names.setdefault(slot.path, []).append(name)

    def leaf(path, target):
        host = np.empty(target.shape, target.dtype)
        for name in names[tuple(str(key.key) for key in path)]:
            slot, tensor = slots[name], reader.read(name)
            host[slot.indices] = slot.to_ours(tensor)
            if hashes is not None:
                hashes[name] = hashlib.sha256(np.ascontiguousarray(tensor, "<f4").data).hexdigest()
        return jax.make_array_from_callback(
            target.shape, target.sharding, lambda index: host[index]
        )

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def find_own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, or None with a warning: weights alone can be converted and
    mixed.

    Raises UserError when there is one and it is damaged.
    """
    try:
        file = find_tokenizer(checkpoint.tokenizer)
    except UserError:
        log.warning("%s: no tokenizer found; only the weights are taken along", checkpoint.path)
        return None
    return load_tokenizer(file)


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To another storage dtype, rounding to nearest even. Raises UserError when a value does not
    fit."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if is_finite(array):
        check_range(name, result)
    return result


def check_range(name: str, array: np.ndarray) -> None:
    """Of a tensor rounded from finite values. Raises UserError when one became infinite."""
    if not is_finite(array):
        raise UserError(
            f"{name} holds values beyond {array.dtype.name}'s range; choose bfloat16 or float32"
        )


def write_checkpoint(
    target: Path,
    as_huggingface: bool,
    model: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    tensor: Callable[[str], np.ndarray],
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
    """A new directory, whole or not at all: `tensor(name)` for every tensor of the model, one at a
    time, cast to dtypes[name].

    The next tensors are made while one is written. check runs when all have been, inspect on the
    finished directory before it gets its name; when either raises, nothing is left. Raises
    UserError when the target exists, cannot be written, a tensor is not finite, or its format has
    no such model.
    """

    def make(name: str) -> tuple[np.ndarray, bool]:
        array = cast(name, tensor(name), dtypes[name])
        return array, not array.flags.writeable or is_finite(
            array
        )  # a reader has seen a read-only one

    places = slots(model)
    names, bad_values = list(places), []
    if by_leaf:
        names.sort(key=lambda name: places[name].path)  # stable: layers stay in order
    dtypes = {name: dtypes[name] for name in names}
    told = {HISTORY: json.dumps(to_dict(history), sort_keys=True)} if history else {}
    with new_directory(target) as partial:
        writer = (
            HuggingFaceWriter(partial, model, dtypes, metadata=told)
            if as_huggingface
            else StepWriter(partial, model, dtypes)
        )
        with ThreadPoolExecutor(AHEAD) as workers:
            made = collections.deque(workers.submit(make, name) for name in names[:AHEAD])
            try:
                for number, name in enumerate(tqdm(names, desc=verb, unit="tensor", disable=None)):
                    array, finite = made.popleft().result()
                    if not finite:
                        bad_values.append(name)
                    if number + AHEAD < len(names):
                        made.append(workers.submit(make, names[number + AHEAD]))
                    writer.write(name, array)
            finally:
                workers.shutdown(cancel_futures=True)
        check()
        if bad_values:
            raise UserError(
                f"NaN or infinity would be written to {', '.join(bad_values[:5])}, though the"
                " sources hold none"
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
    for name in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[name]))
        total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
