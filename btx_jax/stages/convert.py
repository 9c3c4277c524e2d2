"""Convert: a Hugging Face directory -> a checkpoint of ours, or back; the direction follows from
what the source is."""

from pathlib import Path

from btx_jax import __version__
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    find_checkpoint,
    find_own_tokenizer,
    open_reader,
    reads_by_leaf,
    write_checkpoint,
)


def run(source: str, target: str, dtype: str = "") -> str:
    """Returns a line that says what was done. dtype: of all tensors of the result; "" keeps each
    tensor's own.

    Raises UserError listing everything that is wrong with the source; then there is no target.
    """
    found = find_checkpoint(source, "SRC")
    reader = open_reader(found)
    to_huggingface = not found.is_huggingface
    kind = "Hugging Face" if to_huggingface else "btx_jax"
    write_checkpoint(
        Path(target),
        to_huggingface,
        reader.model,
        {name: DTYPES[dtype] if dtype else own for name, own in reader.dtypes.items()},
        reader.read,
        find_own_tokenizer(found),
        history=found.about.history,
        card=_card(
            found.path.name if found.is_huggingface else found.path.parent.parent.name,
            found.about.costs()["tokens"],
        ),
        check=reader.check,
        verb="converting",
        by_leaf=reads_by_leaf([reader]),
    )
    return f"wrote {target} ({kind}, {len(reader.slots)} tensors)"


def _card(name: str, tokens: float) -> str:
    trained = f" Trained here on {tokens:,.0f} tokens in all, seed included." if tokens else ""
    return (
        f"# {name}\n\nConverted by btx_jax {__version__}; parameters are those of {name},"
        f" unchanged.{trained}\n"
    )
