"""SwiGLU of rows sorted by expert, each row with its own expert's weights: four implementations.
Shape legend: layers.py.

R rows, of which the first sum(sizes) belong to experts 0, 1, ... in turn. The outputs of the
remaining rows are undefined, and no gradient flows from them into the weights.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from btx_jax.models.hopper import grouped_matmul, is_possible
from btx_jax.models.layers import (
    Transposed,
    activate,
    joint_swiglu,
    swiglu,
    swiglu_backward,
    swiglu_forward,
)

# Rows per block on a CPU: large enough for full matmul speed, small enough to waste little on
# padding
BLOCK = 128
# Tile on a TPU: rows, bytes of contracted columns, bytes of output columns. Each byte read feeds at
# least 512 multiplications, and the tiles fit in 10 MiB of on-chip memory.
TILES = (512, 2048, 2048)


def grouped_swiglu(
    x_RD: jax.Array,
    sizes_E: jax.Array,
    weights,
    most: int,
    kernels: str,
    activation: str = "silu",
) -> jax.Array:
    """SwiGLU of each row by its expert, [R, D] -> [R, D].

    weights: gate [E, D, F], up [E, D, F], down [E, F, D]; or, for inference, gate_up [D, 2 F] and
    down [F, D] of each expert. most: maximum rows of one expert. kernels: as in ComputeConfig, with
    `auto` resolved.
    """
    if kernels in ("pallas", "pallas_interpret"):
        rows = x_RD.shape[0]
        tile = min(TILES[0], math.ceil(rows / 8) * 8)
        padded_RD = jnp.pad(x_RD, ((0, -rows % tile), (0, 0)))
        matmul = _megablox(sizes_E, tile, interpret=kernels == "pallas_interpret")
        return _swiglu(matmul, activation, padded_RD, *weights)[:rows]
    if kernels == "cuda":
        return _swiglu(_hopper(sizes_E), activation, x_RD, *weights)
    # ragged_dot on a CPU or GPU multiplies every row by every expert.
    blocked = functools.partial(
        _in_turn if isinstance(weights[0], tuple) else _blocked,
        block=min(BLOCK, most),
        activation=activation,
    )
    dots = functools.partial(_ragged_dot, activation=activation)
    return jax.lax.platform_dependent(x_RD, sizes_E, *weights, cpu=blocked, default=dots)


def _swiglu(matmul, activation, x_RD, *weights):
    if isinstance(weights[0], tuple):
        gate_up, down = (
            jnp.stack([w.array.T if isinstance(w, Transposed) else w for w in each])
            for each in zip(*weights, strict=True)
        )
        a_RF, b_RF = jnp.split(matmul(x_RD, gate_up), 2, axis=-1)
    else:
        gate, up, down = weights
        a_RF, b_RF = (checkpoint_name(matmul(x_RD, kernel), "ffn") for kernel in (gate, up))
    return matmul(activate(a_RF, activation) * b_RF, down)


def _megablox(sizes_E: jax.Array, tile: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.megablox import (
        ops as megablox,
    )  # imported here, as for splash, because the import is slow

    def matmul(rows, kernel):
        tiles = _tiles(tile, rows.dtype.itemsize)
        return megablox.gmm(rows, kernel, sizes_E, rows.dtype, tiles, interpret=interpret)

    return matmul


def _hopper(sizes_E: jax.Array):
    def matmul(rows, kernel):
        if not is_possible(rows, kernel):
            return jax.lax.ragged_dot(rows, kernel, sizes_E)
        y = grouped_matmul(rows, kernel, sizes_E)
        # What the kernel leaves in rows of no expert may be no number, and other rows share its
        # tiles.
        return jnp.where((jnp.arange(len(y)) < sizes_E.sum())[:, None], y, 0)

    return matmul


@functools.cache  # equal arguments give the same function, so that JAX reuses its traces
def _tiles(tile: int, itemsize: int):
    """Return a function that chooses the tile of each matmul, forward and backward. A tile spans
    the whole of a dimension or a multiple of 128."""

    def tiles(rows: int, contracted: int, columns: int) -> tuple[int, int, int]:
        return (
            tile,
            min(TILES[1] // itemsize, contracted),
            min(TILES[2] // itemsize, columns),
        )

    return tiles


def _ragged_dot(x_RD, sizes_E, *weights, activation):
    dot = lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes_E)  # noqa: E731
    return _swiglu(dot, activation, x_RD, *weights)


def _in_turn(x_RD, sizes_E, *experts, block, activation):
    """Run separate experts one after another, each in blocks of rows. Surplus rows written by an
    expert's last block are overwritten by the next expert."""
    x_padded = jnp.pad(x_RD, ((0, block), (0, 0)))
    y_padded = jnp.zeros_like(x_padded)
    for start, size, expert in zip(jnp.cumsum(sizes_E) - sizes_E, sizes_E, experts, strict=True):

        def body(i, y_padded, start=start, expert=expert):
            at = start + i * block
            rows = jax.lax.dynamic_slice_in_dim(x_padded, at, block)
            y = joint_swiglu(rows, expert[0], expert[1], activation=activation)
            return jax.lax.dynamic_update_slice_in_dim(y_padded, y, at, axis=0)

        y_padded = jax.lax.fori_loop(0, -(-size // block), body, y_padded)
    return y_padded[: len(x_RD)]


def _blocked(x_RD, sizes_E, gate_EDF, up_EDF, down_EFD, block, activation):
    """Pad every expert's rows to whole blocks, so that each block needs only one expert."""
    experts, rows = len(sizes_E), len(x_RD)
    padded_E = -(-sizes_E // block) * block
    last_padded_E, last_E = jnp.cumsum(padded_E), jnp.cumsum(sizes_E)
    blocks = rows // block + experts  # an upper bound
    row_R = jnp.arange(rows)
    expert_R = jnp.searchsorted(last_E, row_R, side="right")
    safe_R = jnp.minimum(expert_R, experts - 1)
    place_R = (last_padded_E - padded_E)[safe_R] + row_R - (last_E - sizes_E)[safe_R]
    place_R = jnp.where(expert_R < experts, place_R, blocks * block)  # rows of no expert: dropped
    source = jnp.full(blocks * block, rows).at[place_R].set(row_R, mode="drop")
    x_padded = jnp.concatenate([x_RD, jnp.zeros_like(x_RD[:1])])[source].reshape(blocks, block, -1)
    expert_of_block = jnp.searchsorted(last_padded_E, jnp.arange(blocks) * block, side="right")
    y_padded = _block_swiglu(
        x_padded, jnp.minimum(expert_of_block, experts - 1), gate_EDF, up_EDF, down_EFD, activation
    )
    return y_padded.reshape(blocks * block, -1).at[place_R].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _block_swiglu(x, expert, gate, up, down, activation):
    """SwiGLU of block i, x[i] [block, D], with expert[i]'s weights; one block after another."""
    return jax.lax.map(
        lambda xe: swiglu(xe[0], gate[xe[1]], up[xe[1]], down[xe[1]], activation), (x, expert)
    )


def _block_swiglu_forward(x, expert, gate, up, down, activation):
    def one(xe):
        own = tuple(w[xe[1]] for w in (gate, up, down))
        y, (_, a, b, *_) = swiglu_forward(xe[0], own[0], own[1], own[2], activation)
        return y, a, b

    y, a, b = jax.lax.map(one, (x, expert))
    return y, (x, a, b, expert, gate, up, down)


def _block_swiglu_backward(activation, residuals, dy):
    x, a, b, expert, *weights = residuals

    def body(grads, block):
        x, a, b, e, dy = block
        dx, *dw = swiglu_backward(activation, (x, a, b, *(w[e] for w in weights)), dy)
        # Adds to one expert's slice in place; differentiating w[e] would add a whole [E, D, F] per
        # block.
        return [g.at[e].add(d) for g, d in zip(grads, dw, strict=True)], dx

    grads, dx = jax.lax.scan(body, [jnp.zeros_like(w) for w in weights], (x, a, b, expert, dy))
    return dx, None, *grads


_block_swiglu.defvjp(_block_swiglu_forward, _block_swiglu_backward)
