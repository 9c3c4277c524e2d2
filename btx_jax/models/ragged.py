"""Dropless expert computation: tokens sorted by expert, no capacity. Shape legend: layers.py."""

import jax
import jax.numpy as jnp

from btx_jax.models.layers import swiglu, swiglu_backward, swiglu_forward

BLOCK = 128  # rows per block on the CPU path: large enough for full matmul speed, small enough to waste little on padding


def ragged_experts(x_MD: jax.Array, gate_MK: jax.Array, index_MK: jax.Array, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """sum_k gate[m, k] FF_index[m, k](x[m]) for every token m. Returns [M, D].

    Index E (padding) contributes nothing. Where K > 1, the gates of a token are a softmax over its K choices: they sum to one.
    """
    experts = gate_EDF.shape[0]
    tokens, k = index_MK.shape
    expert_R = index_MK.reshape(-1)  # R = M K claims, each of one token on one expert
    order_R = jnp.argsort(expert_R, stable=True)
    sizes_E = jnp.bincount(expert_R, length=experts + 1)[:experts].astype(jnp.int32)

    def blocks(x_MD, order_R, sizes_E, *weights):
        return _blocked(x_MD, expert_R, order_R, sizes_E, k, *weights)

    def sorted_rows(x_MD, order_R, sizes_E, gate, up, down):
        x_RD = x_MD[order_R // k]
        matmul = lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes_E)  # noqa: E731
        y_RD = matmul(jax.nn.silu(matmul(x_RD, gate)) * matmul(x_RD, up), down)
        return y_RD[jnp.argsort(order_R)]

    # ragged_dot on the CPU multiplies every row by every expert.
    y_RD = jax.lax.platform_dependent(x_MD, order_R, sizes_E, gate_EDF, up_EDF, down_EFD, cpu=blocks, default=sorted_rows)
    y_MKD = jnp.where((index_MK < experts)[..., None], y_RD.reshape(tokens, k, -1), 0)
    gate_MK = gate_MK.astype(y_RD.dtype)
    if k == 1:
        return y_MKD[:, 0] * gate_MK
    # As the gates sum to one, this is their weighted sum, and experts that agree give their common answer without rounding.
    first_MD = y_MKD[:, 0]
    return first_MD + jnp.einsum("mkd,mk->md", y_MKD[:, 1:] - first_MD[:, None], gate_MK[:, 1:])


def _blocked(x_MD, expert_R, order_R, sizes_E, k, gate_EDF, up_EDF, down_EFD):
    """Every expert's rows padded to whole blocks, so that each block meets one expert. Returns [R, D] in claim order."""
    experts, tokens, claims = gate_EDF.shape[0], x_MD.shape[0], expert_R.shape[0]
    block = min(BLOCK, tokens)  # of few tokens, as many rows as the dense layer would see: the same kernel, the same rounding
    padded_E = -(-sizes_E // block) * block
    first_padded_E = jnp.cumsum(padded_E) - padded_E
    first_sorted_E = jnp.cumsum(sizes_E) - sizes_E
    blocks = claims // block + experts + 1  # the most there can be, and one of zeros that padding reads from
    rank_R = jnp.zeros(claims, jnp.int32).at[order_R].set(jnp.arange(claims, dtype=jnp.int32))
    safe_R = jnp.minimum(expert_R, experts - 1)
    row_R = jnp.where(expert_R < experts, first_padded_E[safe_R] + rank_R - first_sorted_E[safe_R], (blocks - 1) * block)
    source = jnp.full(blocks * block, x_MD.shape[0], jnp.int32).at[row_R].set(jnp.arange(claims, dtype=jnp.int32) // k)
    source = source.at[(blocks - 1) * block :].set(x_MD.shape[0])
    x_padded = jnp.concatenate([x_MD, jnp.zeros_like(x_MD[:1])])[source].reshape(blocks, block, -1)
    expert_of_block = jnp.searchsorted(jnp.cumsum(padded_E), jnp.arange(blocks) * block, side="right")
    y_padded = _block_swiglu(x_padded, jnp.minimum(expert_of_block, experts - 1), gate_EDF, up_EDF, down_EFD)
    return y_padded.reshape(blocks * block, -1)[row_R]


@jax.custom_vjp
def _block_swiglu(x, expert, gate, up, down):
    """SwiGLU of block i, x[i] [block, D], with expert[i]'s weights; one block after another."""
    return jax.lax.map(lambda xe: swiglu(xe[0], gate[xe[1]], up[xe[1]], down[xe[1]]), (x, expert))


def _block_swiglu_forward(x, expert, gate, up, down):
    def one(xe):
        y, (_, a, b, *_) = swiglu_forward(xe[0], gate[xe[1]], up[xe[1]], down[xe[1]])
        return y, a, b

    y, a, b = jax.lax.map(one, (x, expert))
    return y, (x, a, b, expert, gate, up, down)


def _block_swiglu_backward(residuals, dy):
    x, a, b, expert, *weights = residuals

    def body(grads, block):
        x, a, b, e, dy = block
        dx, *dw = swiglu_backward((x, a, b, *(w[e] for w in weights)), dy)
        # Adds to one expert's slice in place; differentiating w[e] would add a whole [E, D, F] for every block.
        return [g.at[e].add(d) for g, d in zip(grads, dw, strict=True)], dx

    grads, dx = jax.lax.scan(body, [jnp.zeros_like(w) for w in weights], (x, a, b, expert, dy))
    return dx, None, *grads


_block_swiglu.defvjp(_block_swiglu_forward, _block_swiglu_backward)
