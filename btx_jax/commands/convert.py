"""Convert: a Hugging Face directory -> a checkpoint of ours, or back; the direction follows from
what the source is."""

from collections.abc import Mapping

import numpy as np

from btx_jax import __version__
from btx_jax.architectures.tensors import Reader, TensorId
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    find_checkpoint,
    find_own_tokenizer,
    open_reader,
    reads_by_leaf,
    write_checkpoint,
)
from btx_jax.checkpoints.training_state import trained_on
from btx_jax.paths import to_path


def run(source: str, target: str, dtype: str = "") -> str:
    """Returns a line that says what was done. dtype: of all tensors of the result; "" keeps each
    tensor's own, widened to float32 where the tensors of one leaf here differ.

    Raises UserError listing everything that is wrong with the source; then no target is left.
    """
    found = find_checkpoint(source, "SRC")
    reader = open_reader(found)
    to_huggingface = not found.is_huggingface
    kind = "Hugging Face" if to_huggingface else "btx_jax"
    write_checkpoint(
        to_path(target, "DST"),
        to_huggingface,
        reader.model,
        dict.fromkeys(reader.slots, DTYPES[dtype]) if dtype else _dtypes(reader, to_huggingface),
        reader.read,
        find_own_tokenizer(found),
        history=found.metadata.history,
        huggingface=found.metadata.huggingface,
        card=_card(
            found.name,
            trained_on(found.metadata.history),
        ),
        check=reader.check,
        verb="converting",
        by_leaf=reads_by_leaf([reader]),
    )
    return f"wrote {target} ({kind}, {len(reader.slots)} tensors)"


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
