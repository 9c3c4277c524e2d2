"""Convert a Hugging Face directory to a btx_jax checkpoint, or back, depending on the source."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from btx_jax import __version__
from btx_jax.architectures.tensors import Reader, TensorId
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    find_own_tokenizer,
    open_reader,
    reads_by_leaf,
    write_checkpoint,
)
from btx_jax.checkpoints.training_state import trained_on


def convert(source: Checkpoint, target: Path, dtype: str = "") -> int:
    """Convert a checkpoint; returns the number of tensors. dtype: of all tensors of the result; ""
    keeps each tensor's own, widened to float32 where the tensors that make up a leaf differ.

    Raises UserError that lists everything wrong with the source; then no target is written.
    """
    reader = open_reader(source)
    to_huggingface = not source.is_huggingface
    write_checkpoint(
        target,
        to_huggingface,
        reader.model,
        dict.fromkeys(reader.slots, DTYPES[dtype]) if dtype else _dtypes(reader, to_huggingface),
        reader.read,
        find_own_tokenizer(source),
        history=source.metadata.history,
        huggingface=source.metadata.huggingface,
        card=_card(source.name, trained_on(source.metadata.history)),
        check=reader.check,
        verb="converting",
        by_leaf=reads_by_leaf([reader]),
    )
    return len(reader.slots)


def _dtypes(reader: Reader, to_huggingface: bool) -> Mapping[TensorId, np.dtype]:
    if to_huggingface:
        return reader.dtypes
    by_leaf: dict[tuple[str, ...], set[np.dtype]] = {}
    for tensor, slot in reader.slots.items():
        by_leaf.setdefault(slot.path, set()).add(reader.dtypes[tensor])
    wide = {path for path, held in by_leaf.items() if len(held) > 1}
    return {
        tensor: np.dtype(np.float32) if slot.path in wide else reader.dtypes[tensor]
        for tensor, slot in reader.slots.items()
    }


def _card(name: str, trained: str) -> str:
    return (
        f"# {name}\n\nConverted by btx_jax {__version__}; parameters are those of {name},"
        f" unchanged.{trained}\n"
    )
