"""Convert a Hugging Face directory to a btx_jax checkpoint, or back."""

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.checkpoints.converting import convert
from btx_jax.paths import to_path
from btx_jax.terminal import counted


def run(source: str, target: str, dtype: str = "") -> str:
    """Convert a checkpoint; returns a line that reports the result. dtype: as for `convert`. Raises
    UserError that lists everything wrong with the source, and then leaves no target."""
    found = find_checkpoint(source, "SRC")
    tensors = convert(found, to_path(target, "DST"), dtype)
    kind = "btx_jax" if found.is_huggingface else "Hugging Face"
    return f"wrote {target} ({kind}, {counted(tensors, 'tensor')})"
