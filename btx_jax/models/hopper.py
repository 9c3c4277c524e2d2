"""Matmuls of rows grouped by expert on NVIDIA's Hopper GPUs: JAX's own Mosaic kernels, with their
gradients. Shape legend: layers.py."""

from typing import Any

import jax
import jax.numpy as jnp

from btx_jax.models.layers import compute_capability

# The fastest of a few tiles on an H200, with the steps in flight and the tiles of columns that are
# visited together. FORWARD: rows, columns, contracted columns. WEIGHTS: columns of the rows and of
# the gradients, contracted rows.
FORWARD: dict[str, Any] = {
    "block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8
}  # fmt: skip
WEIGHTS: dict[str, Any] = {
    "block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1
}  # fmt: skip
SIDE = 128  # fewest rows, and what the widths of an expert's matrices must be multiples of


def is_possible(rows_RD: jax.Array, kernel_EDF: jax.Array) -> bool:
    """Whether these kernels multiply such rows by such matrices on this process's devices."""
    is_tiled = len(rows_RD) >= SIDE and not any(width % SIDE for width in kernel_EDF.shape[1:])
    is_bfloat16 = rows_RD.dtype == kernel_EDF.dtype == jnp.bfloat16
    return is_tiled and is_bfloat16 and 9.0 <= compute_capability() < 10.0


def _together(columns: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with no more tiles visited together than there are."""
    tiles = columns // settings["block_n"]
    together = next(n for n in range(settings["grid_block_n"], 0, -1) if tiles % n == 0)
    return settings | {"grid_block_n": together}


def multiply(
    rows_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, is_transposed: bool = False
) -> jax.Array:
    """`grouped_matmul` without gradients. is_transposed: the kernel is [E, F, D] instead."""
    # Imported here because the import is slow.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    settings = _together(kernel_EDF.shape[1 if is_transposed else 2], FORWARD)
    return ragged_dot(
        rows_RD, kernel_EDF, group_sizes=sizes_E, transpose_rhs=is_transposed, **settings
    )


def kernel_gradient(rows_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Sum of the outer products of each expert's rows, [E, D, F]."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    settings = _together(dy_RF.shape[1], WEIGHTS)
    return transposed_ragged_dot(rows_RD, dy_RF, group_sizes=sizes_E, **settings)


@jax.custom_vjp
def grouped_matmul(rows_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each row times the matrix of its expert, [R, D] -> [R, F], where `is_possible`. Rows as for
    `grouped_swiglu`: those of no expert come out undefined, forward and backward, and may be no
    numbers; they must go in as numbers."""
    return multiply(rows_RD, kernel_EDF, sizes_E)


def _forward(rows_RD, kernel_EDF, sizes_E):
    return multiply(rows_RD, kernel_EDF, sizes_E), (rows_RD, kernel_EDF, sizes_E)


def _backward(residuals, dy_RF):
    rows_RD, kernel_EDF, sizes_E = residuals
    drows_RD = multiply(dy_RF, kernel_EDF, sizes_E, is_transposed=True)
    return drows_RD, kernel_gradient(rows_RD, dy_RF, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)
