"""Verify a finished mixture against its sources."""

from btx_jax.architectures.tensors import Reader
from btx_jax.errors import UserError
from btx_jax.mixing.merge import MERGES
from btx_jax.mixing.streaming import Mixture, is_averaged, make_tensor
from btx_jax.progress import bar
from btx_jax.terminal import counted


def verify(mixture: Mixture, written: Reader) -> str:
    """Compare every tensor with what the recipe makes from the sources: bit for bit, or by the
    merge's own check. Returns a line that reports the result. Raises UserError, naming the tensors
    that differ."""
    merge = MERGES[mixture.recipe.merge]
    by_itself = merge.is_right is not None and len(mixture.averaged()) > 1
    wrong, means = [], 0
    for tensor in bar(written.slots, desc="verifying", unit="tensor"):
        found = written.read(tensor)
        if by_itself and is_averaged(tensor) and tensor in mixture.base.slots:
            means += 1
            right = mixture.shared.is_right(tensor, found)
        else:
            expected = make_tensor(mixture, tensor)
            right = found.dtype == expected.dtype and found.shape == expected.shape
            right = right and found.tobytes() == expected.tobytes()
        if not right:
            wrong.append(tensor)
    if wrong:
        raise UserError(
            f"the output was deleted: {counted(len(wrong), 'tensor')} that differ from what the"
            f" recipe makes: {', '.join(map(str, wrong[:5]))}"
        )
    count = len(written.slots)
    rest = f"{count - means} equal what the recipe makes of their sources, bit for bit"
    return f"verified {count} tensors: {rest}, {means} means within one ulp of {mixture.dtype.name}"
