"""Sources of a mixture in mergekit's notation, MODEL or MODEL+LORA: the LoRA is merged while the
model is read, one tensor at a time."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from btx_jax import hub, hub_names
from btx_jax.architectures.layout import Row
from btx_jax.architectures.tensors import Reader, Region, TensorId
from btx_jax.architectures.values import is_finite
from btx_jax.checkpoints import adapter, peft, peft_config
from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    adapter_tensors,
    base_of,
    find_checkpoint,
    open_reader,
)
from btx_jax.checkpoints.problems import listed, raise_problems
from btx_jax.checkpoints.training_state import elsewhere, together
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.paths import to_path

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A LoRA to merge. model: config with its lora section. tensors: as in a btx_jax adapter
    directory."""

    path: Path
    model: ModelConfig
    tensors: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and optionally the LoRA to merge into it. checkpoint: the model's, with the history
    of both."""

    checkpoint: Checkpoint
    lora: LoRA | None = None

    @property
    def place(self) -> str:
        """Identifies the source's files; the same for two spellings of a path."""
        return f"{self.checkpoint.path}{f'+{self.lora.path}' if self.lora else ''}"


def find_source(path: str, key: str) -> Source:
    """Find a model's directory or Hub name, or MODEL+LORA, where LORA is a peft directory, a
    btx_jax adapter, or the Hub name of one. A directory whose own name contains a + takes
    precedence. Raises UserError for anything else, and for a LoRA that does not fit its model or
    cannot be merged."""
    if not _exists(path, key):
        parts = path.split("+")
        splits = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(1, len(parts))]
        for model, lora in splits:
            if _exists(model, key) and _exists(lora, key):
                return _with_lora(model, lora, key)
        if splits:  # report the missing one below
            model, lora = splits[0]
            path = lora if _exists(model, key) else model
    return Source(find_checkpoint(path, key))


def _exists(path: str, key: str) -> bool:
    try:
        return hub_names.named(path, key) is not None or to_path(path, key).exists()
    except (OSError, ValueError, UserError):  # a name too long, a NUL in it, hf:// before a +
        return False


def _with_lora(model: str, lora: str, key: str) -> Source:
    found = find_checkpoint(model, key)
    if found.metadata.model.lora:
        raise UserError(f"{key}: {model} holds LoRA experts; name the model that they adapt")
    directory = hub.resolve(lora, key).resolve()
    if (directory / peft_config.CONFIG).is_file():
        origin = found.metadata.huggingface.get("model_type", "")
        read = peft.read(directory, found.metadata.model, origin)
        notes = [*read.notes]
        if read.carried:
            notes += left_out(read.carried, open_reader(found), directory)
        made = LoRA(directory, read.model, read.tensors)
        history = elsewhere(directory)
    else:
        trained = find_checkpoint(lora, key)
        if trained.metadata.base is None or trained.metadata.model.lora is None:
            raise UserError(f"{key}: {lora} holds no LoRA; name a directory of peft or an adapter")
        if trained.metadata.model.base() != found.metadata.model:
            raise UserError(f"{key}: {lora} was trained on a different model from {model}")
        if base_of(found).digest != trained.metadata.base.digest:
            raise UserError(
                f"{key}: {model} has different weights from the model that {lora} was trained on"
            )
        notes = []
        made = LoRA(trained.path, trained.metadata.model, adapter_tensors(trained))
        history = trained.metadata.history
    for spec in made.model.layer_specs():
        if spec.lora and spec.lora.has_router:
            raise UserError(
                f"{key}: the choices of the routers of {lora} cannot be merged into weights;"
                f" fix them first: btx adapter merge {lora} MERGED --gates=mean, and name"
                " MERGED"
            )
    for note in notes:
        log.warning("%s: %s", lora, note)
    both = together([found.metadata.history, history])
    metadata = dataclasses.replace(found.metadata, history=both)
    return Source(dataclasses.replace(found, metadata=metadata), made)


def left_out(tensors: Sequence[tuple[Row, np.ndarray]], base: Reader, directory: Path) -> list[str]:
    """Messages about tensors of the base that are stored with a peft LoRA. Those equal to the
    base's own are skipped. Raises UserError if any differs."""
    problems = []
    for row, array in tensors:
        own = row.joined(base.read)
        if array.shape != own.shape:
            problems.append(f"{row.name} is {array.shape}, the base's {own.shape}")
        elif not np.array_equal(array.astype(np.float32), own.astype(np.float32)):
            problems.append(f"{row.name} differs from the base's")
    if problems:
        raise UserError(
            f"{directory}: holds tensors of the base itself (modules_to_save, bias, or resized"
            f" embeddings), but LoRA here leaves the base unchanged: {'; '.join(problems)}; if"
            f" BASE is the model it was trained on, {peft.MERGE}"
        )
    if not tensors:
        return []
    return [
        f"left out, as they equal those of the base: {listed([row.name for row, _ in tensors])}"
    ]


def open_source(source: Source) -> Reader:
    """Open a source for reading. Raises UserError that lists everything wrong with the model except
    its values."""
    reader = open_reader(source.checkpoint)
    return MergedReader(reader, source.lora) if source.lora else reader


class MergedReader:
    """Reads a model with a LoRA of one expert per layer merged: W + (alpha / rank) B A in float32,
    rounded once to the dtype of W."""

    def __init__(self, reader: Reader, lora: LoRA):
        self.model, self.slots, self.dtypes = reader.model, reader.slots, reader.dtypes
        self.by_leaf = getattr(reader, "by_leaf", False)
        self._reader, self._lora = reader, lora
        self._names: dict[TensorId, tuple[str, str]] = {}
        for name in lora.tensors:
            _, layer, target, part = name.split(".")
            if part == "a":
                names = name, f"layers.{layer}.{target}.b"
                self._names[adapter.adapted(target, int(layer))] = names
        self._bad_values: list[TensorId] = []

    def read(self, tensor: TensorId) -> np.ndarray:
        array = self._reader.read(tensor)
        if tensor not in self._names:
            return array
        pair = {name: self._lora.tensors[name] for name in self._names[tensor]}
        delta = adapter.merged_delta(self._lora.model, pair, np.ones).get(tensor)
        if delta is None:
            return array
        with np.errstate(over="ignore"):
            merged = (array.astype(np.float32) + delta).astype(array.dtype)
        if not is_finite(merged) and is_finite(array):
            self._bad_values.append(tensor)
        merged.flags.writeable = False
        return merged

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        """A region of the whole merged tensor."""
        if tensor not in self._names:
            return self._reader.read_region(tensor, region)
        whole = self.slots[tensor].to_ours(self.read(tensor))
        return whole[tuple(slice(*along) for along in region)]

    def check(self) -> None:
        """Raise UserError when a tensor that was read contained NaN or infinity."""
        self._reader.check()
        bad = [
            f"{tensor} merged with it exceeds the range of its dtype" for tensor in self._bad_values
        ]
        raise_problems(self._lora.path, list(dict.fromkeys(bad)))
