"""Dropless expert computation: each device sorts its claims by expert and multiplies group by
group. Shape legend: layers.py.

A claim is one (token, choice) pair; R of them, sorted by expert, are the rows of the grouped
matmuls. Over an expert axis of n devices, the tokens of all n are gathered, each device computes
its own experts, and the outputs are summed and scattered back. Each way, (n - 1) M rows are sent, n
/ k times as many as the k M (n - 1) / n of an all-to-all. In return, sizes do not depend on the
router, nothing can overflow, and the program is the same on every platform. The maximum of R is the
same as for an all-to-all that never drops.
"""

import jax
import jax.numpy as jnp

from btx_jax.models.grouped import grouped_swiglu
from btx_jax.models.layers import scaled_swiglu
from btx_jax.parallel.sharding import all_gather, axis_index, psum, psum_scatter, shard_map


def ragged_experts(
    x_MD: jax.Array,
    gate_MK: jax.Array,
    index_MK: jax.Array,
    gate_EDF,
    up_EDF,
    down_EFD,
    kernels: str = "xla",
    sums_to_one: bool = True,
    activation: str = "silu",
) -> jax.Array:
    """sum_k gate[m, k] FF_index[m, k](x[m]) for every token m, [M, D].

    Index E (padding, or the anchor) contributes nothing. sums_to_one: as in `weighted_sum`.
    """
    experts = len(gate_EDF)

    def local(x_MD, gate_MK, index_MK, gate_EDF, up_EDF, down_EFD):
        # Gathered explicitly: the transpose is then a reduce-scatter, where shard_map would
        # all-reduce whole gradients.
        gate_EDF, up_EDF = (all_gather(w, "expert_embed", axis=1) for w in (gate_EDF, up_EDF))
        down_EFD = all_gather(down_EFD, "expert_embed", axis=2)
        own = len(gate_EDF)
        if experts == 1:  # nothing to sort
            gate_M = jnp.where(index_MK == 0, gate_MK, 0).sum(1)
            y_MD = scaled_swiglu(x_MD, gate_M, gate_EDF[0], up_EDF[0], down_EFD[0], activation)
            return psum(y_MD, "hidden")
        if own < experts:
            x_MD, gate_MK, index_MK = (
                all_gather(x, "expert", axis=0) for x in (x_MD, gate_MK, index_MK)
            )
            index_MK = index_MK - axis_index("expert") * own
        is_own_MK = (index_MK >= 0) & (index_MK < own)
        y_MKD = expert_outputs(
            x_MD,
            jnp.where(is_own_MK, index_MK, own),
            own,
            (gate_EDF, up_EDF, down_EFD),
            kernels,
            activation,
        )
        if own < experts:
            y_MD = psum_scatter(
                jnp.einsum("mkd,mk->md", y_MKD, gate_MK.astype(y_MKD.dtype)), "expert", axis=0
            )
        else:
            y_MD = weighted_sum(y_MKD, gate_MK, sums_to_one)
        return psum(y_MD, "hidden")

    rows = ("group",)
    into, out = ("expert", "expert_embed", "hidden"), ("expert", "hidden", "expert_embed")
    return shard_map(local, (rows, rows, rows, into, into, out), rows)(
        x_MD, gate_MK, index_MK, gate_EDF, up_EDF, down_EFD
    )


def weighted_sum(y_MKD: jax.Array, gate_MK: jax.Array, sums_to_one: bool) -> jax.Array:
    """sum_k gate[m, k] y[m, k]. sums_to_one: whether the gates of each token sum to one, for K >
    1."""
    gate_MK = gate_MK.astype(y_MKD.dtype)
    if gate_MK.shape[1] == 1:
        return y_MKD[:, 0] * gate_MK
    if not sums_to_one:
        return jnp.einsum("mkd,mk->md", y_MKD, gate_MK)
    # Equal to the weighted sum because the gates sum to one. Where all experts agree, the result is
    # their common output without rounding.
    first_MD = y_MKD[:, 0]
    return first_MD + jnp.einsum("mkd,mk->md", y_MKD[:, 1:] - first_MD[:, None], gate_MK[:, 1:])


def expert_outputs(
    x_MD: jax.Array,
    index_MK: jax.Array,
    experts: int,
    weights,
    kernels: str,
    activation: str = "silu",
) -> jax.Array:
    """FF_index[m, k](x[m]), [M, K, D]; zero where the index is `experts`, which sorts last.
    weights: as for grouped_swiglu."""
    tokens, k = index_MK.shape
    expert_N = index_MK.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)  # claims by expert
    rank_N = (
        jnp.zeros_like(order_N)
        .at[order_N]
        .set(jnp.arange(tokens * k, dtype=jnp.int32), unique_indices=True)
    )
    sizes_E = (expert_N[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    rows = tokens * min(k, experts)  # a token's choices are distinct: at most `experts` claims
    places = (order_N[:rows], jnp.where(expert_N < experts, rank_N, rows).reshape(tokens, k))
    y_RD = grouped_swiglu(_sort(x_MD, *places), sizes_E, weights, tokens, kernels, activation)
    return _unsort(y_RD, *places)


# Sorting and unsorting are transposes of each other, and both are gathers. Autodiff would make
# their transposes scatters, which a TPU executes row by row.


@jax.custom_vjp
def _sort(x_MD: jax.Array, order_R: jax.Array, rank_MK: jax.Array) -> jax.Array:
    """[M, D] -> [R, D]: row r is the token of claim order[r]."""
    return x_MD[order_R // rank_MK.shape[1]]


@jax.custom_vjp
def _unsort(y_RD: jax.Array, order_R: jax.Array, rank_MK: jax.Array) -> jax.Array:
    """[R, D] -> [M, K, D]: row rank[m, k], or zeros where rank is R."""
    return jnp.where(
        (rank_MK < y_RD.shape[0])[..., None], y_RD[jnp.minimum(rank_MK, y_RD.shape[0] - 1)], 0
    )


def _sort_backward(places, dy_RD):
    return _unsort(dy_RD, *places).sum(axis=1), None, None


def _unsort_backward(places, dy_MKD):
    order_R, rank_MK = places
    mine_MK1 = (rank_MK < order_R.shape[0])[..., None]
    return jnp.where(mine_MK1, dy_MKD, 0).reshape(-1, dy_MKD.shape[-1])[order_R], None, None


_sort.defvjp(lambda x, *places: (_sort(x, *places), places), _sort_backward)
_unsort.defvjp(lambda y, *places: (_unsort(y, *places), places), _unsort_backward)
