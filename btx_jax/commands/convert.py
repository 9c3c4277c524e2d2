"""Convert: a Hugging Face directory -> a checkpoint of ours, or back."""

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.checkpoints.converting import convert
from btx_jax.paths import to_path


def run(source: str, target: str, dtype: str = "") -> str:
    """Returns a line that says what was done. dtype: as `convert` takes it. Raises UserError
    listing everything that is wrong with the source; then there is no target."""
    found = find_checkpoint(source, "SRC")
    tensors = convert(found, to_path(target, "DST"), dtype)
    kind = "btx_jax" if found.is_huggingface else "Hugging Face"
    return f"wrote {target} ({kind}, {tensors} tensors)"
