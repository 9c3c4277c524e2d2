"""Drop-Upcycling (arXiv 2502.19261): copies of one feed-forward become distinct experts by
reinitialising some hidden units of each. Pure functions on parameter trees."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


def redrawn(params: Params, key: jax.Array, share: float) -> dict[str, Any]:
    """The mixture with round(share * d_ff) hidden units of every expert reinitialised, at least
    one; units are chosen at random for each expert and layer.

    A unit is a column of gate, the same column of up and the same row of down. New values are
    normal, with the mean and standard deviation of those they replace in that matrix. Everything
    else stays bit-identical, including biases, shared experts and dense runs.
    """
    runs = [name for name in params if name.startswith("layers_")]
    result = dict(params)
    for number, name in enumerate(runs):
        ffn = params[name]["ffn"]
        if "router" in ffn:
            key_of_run = jax.random.fold_in(key, number)
            result[name] = {**params[name], "ffn": {**ffn, **_redrawn_ffn(ffn, key_of_run, share)}}
    return result


def _redrawn_ffn(
    ffn: Mapping[str, jax.Array], key: jax.Array, share: float
) -> dict[str, jax.Array]:
    """Reinitialise hidden units. ffn: gate and up [L, N, D, F], down [L, N, F, D]."""
    layers, experts, _, d_ff = ffn["gate"].shape
    of_units, *of_matrices = jax.random.split(key, 4)
    count = max(1, round(share * d_ff))
    first = jnp.broadcast_to(jnp.arange(d_ff) < count, (layers, experts, d_ff))
    new_LNF = jax.random.permutation(of_units, first, axis=-1, independent=True)
    masks = {"gate": new_LNF[..., None, :], "up": new_LNF[..., None, :], "down": new_LNF[..., None]}
    return {
        name: _redrawn(ffn[name], mask, of_matrix)
        for (name, mask), of_matrix in zip(masks.items(), of_matrices, strict=True)
    }


def _redrawn(matrices: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    """Reinitialise entries of matrices [L, N, ., .]. mask: true for these entries; of size 1 along
    the axis that is not d_ff."""
    values = matrices.astype(jnp.float32)
    mask = jnp.broadcast_to(mask, matrices.shape)
    mean = values.mean((-2, -1), keepdims=True, where=mask)
    std = values.std((-2, -1), keepdims=True, where=mask)
    drawn = mean + std * jax.random.normal(key, matrices.shape, jnp.float32)
    return jnp.where(mask, drawn.astype(matrices.dtype), matrices)
