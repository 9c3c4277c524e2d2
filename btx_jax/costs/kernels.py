"""FLOPs of TPU kernels, which are opaque to the compiler, from the shapes of their operands."""

import math

from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.program import Kernel
from btx_jax.models.splash import shard_block_size

# Number of matmuls of T x T x head width in each splash kernel. Forward: scores and weighted sum.
# dq: scores, gradient of the probabilities, and dq. dkv: the first two of these, dk and dv.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(kernel: Kernel, window: int = 0) -> float:
    """FLOPs of all executions of the kernel. Splash counts the tiles at or below the diagonal, with
    a window only those that it touches; a device that holds part of each row (context parallelism)
    counts its share. gmm and tgmm count all rows of the buffer, an upper bound. Raises ValueError
    for an unknown kernel."""
    for name, matmuls in SPLASH.items():
        if kernel.name.startswith(name):
            q, (*_, length, _) = _queries_and_keys(kernel)
            side = shard_block_size(length, length // q[-2])
            tiles, reach = length // side, window or length
            met = sum(row - max(0, row * side - reach + 1) // side + 1 for row in range(tiles))
            return 2.0 * matmuls * math.prod(q) * length * met / tiles**2 * kernel.trips
    if kernel.name == "gmm":
        rows, weights = kernel.operands[-2].dims, kernel.operands[-1].dims
        return 2.0 * rows[0] * weights[1] * weights[2] * kernel.trips
    if kernel.name == "tgmm":
        left, right = kernel.operands[-2].dims, kernel.operands[-1].dims
        return 2.0 * left[0] * left[1] * right[1] * kernel.trips
    raise ValueError(
        f"kernel {kernel.name!r}: no formula for its FLOPs; add one to costs/kernels.py"
    )


def filled(kernel: Kernel, array: int) -> float:
    """Fraction of an array x array matrix unit that a kernel's matmuls fill. Only splash's can be
    too narrow: they are as wide as a head."""
    if not kernel.name.startswith("splash"):
        return 1.0
    return min(1.0, _queries_and_keys(kernel)[0][-1] / array)


def _queries_and_keys(splash: Kernel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a splash kernel's queries [..., H, T, K] and keys [..., N, S, K]. The operands
    before them are integers that say which tiles are computed."""
    q, k, *_ = (shape.dims for shape in splash.operands if shape.dtype in ("bf16", "f32"))
    return q, k


def rows_in_use(kernel: Kernel, model: ModelConfig, expert_axis: int) -> float:
    """Fraction of the rows of a grouped matmul's buffer that hold claims when routing is balanced.
    The buffer is sized for the largest number of claims that the device's experts can receive."""
    own = (kernel.operands[-1] if kernel.name == "gmm" else kernel.results[0]).dims[0]
    spec = next(spec for spec in model.layer_specs() if spec.experts == own * expert_axis)
    claims = spec.k * spec.experts / spec.routed  # per token; the anchor's claims have no rows here
    return claims / expert_axis / min(spec.k, own)
