"""FLOPs of TPU kernels, which are opaque to the compiler, from the shapes of their operands."""

import math

from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.program import Kernel
from btx_jax.models.splash import block_size

# Number of [T, T] by head-width matmuls in each splash kernel: scores and sum; scores,
# probabilities' gradient and dq; both of these and dk, dv.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(kernel: Kernel, window: int = 0) -> float:
    """FLOPs of all executions of the kernel. Splash: tiles at or below the diagonal; with a window,
    those that it touches. gmm and tgmm: all rows of the buffer, an upper bound. Raises ValueError
    for an unknown kernel."""
    for name, matmuls in SPLASH.items():
        if kernel.name.startswith(name):
            q = max(kernel.operands, key=lambda shape: shape.bytes).dims  # [..., H, T, K]
            side = block_size(q[-2])
            tiles, reach = q[-2] // side, window or q[-2]
            met = sum(row - max(0, row * side - reach + 1) // side + 1 for row in range(tiles))
            return 2.0 * matmuls * math.prod(q) * q[-2] * met / tiles**2 * kernel.trips
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
    """Fraction of an array x array matrix unit that a kernel's matmuls fill: those of splash are as
    narrow as a head."""
    if not kernel.name.startswith("splash"):
        return 1.0
    head = max(kernel.operands, key=lambda shape: shape.bytes).dims[-1]
    return min(1.0, head / array)


def rows_in_use(kernel: Kernel, model: ModelConfig, expert_axis: int) -> float:
    """Fraction of a grouped matmul's buffer that contains claims when routing is balanced: the
    buffer has room for the most claims that the device's experts can get."""
    own = (kernel.operands[-1] if kernel.name == "gmm" else kernel.results[0]).dims[0]
    spec = next(spec for spec in model.layer_specs() if spec.experts == own * expert_axis)
    claims = spec.k * spec.experts / spec.routed  # per token; the anchor's claims have no rows here
    return claims / expert_axis / min(spec.k, own)
