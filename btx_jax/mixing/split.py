"""Split feed-forwards along d_ff and recombine them before mixing (BTX section 4.4, "split" and
"blend")."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from btx_jax.config.mix_methods import Piece, cut

Params = Mapping[str, Any]


def split_ffn(ffn: Mapping[str, jax.Array], chunks: int) -> dict[str, jax.Array]:
    """{gate, up: [L, D, F], down: [L, F, D]} -> {gate, up: [L, C, D, F / C], down: [L, C, F / C,
    D]}.

    SwiGLU acts on each hidden unit separately, so the outputs of all C chunks, each with weight 1,
    sum to the block's output. Raises ValueError when chunks does not divide F.
    """
    hidden = ffn["gate"].shape[-1]
    if hidden % chunks:
        raise ValueError(f"d_ff={hidden} is not divisible into {chunks} chunks")

    def chunked(name: str, leaf: jax.Array) -> jax.Array:
        if name == "down":
            return leaf.reshape(leaf.shape[0], chunks, hidden // chunks, leaf.shape[2])
        return leaf.reshape(*leaf.shape[:2], chunks, hidden // chunks).swapaxes(1, 2)

    return {name: chunked(name, leaf) for name, leaf in ffn.items()}


def expert_models(models: Sequence[Params], method: str, chunks: int = 1) -> list[dict[str, Any]]:
    """Make one dense tree for each of the method's M experts from N dense trees, for `mix_params`
    to mix. Tree e has the feed-forwards of expert e and the other parameters of source e * N // M.
    Raises ConfigError if d_ff cannot be split."""
    first = next(iter(_runs(models[0])))
    d_ff = models[0][first]["ffn"]["gate"].shape[-1]
    made = cut(method, len(models), chunks, d_ff)
    if made.pieces == 1:
        return [dict(model) for model in models]
    parts = [
        {run: split_ffn(model[run]["ffn"], made.pieces) for run in _runs(model)} for model in models
    ]
    axes = {"gate": 2, "up": 2, "down": 1}

    def joined(expert: Sequence[Piece], run: str) -> dict[str, jax.Array]:
        return {
            name: jnp.concatenate([parts[p.source][run][name][:, p.number] for p in expert], axis)
            for name, axis in axes.items()
        }

    return [
        _with_ffn(model, {run: joined(made.made_of(expert), run) for run in _runs(model)})
        for expert in range(made.experts)
        for model in [models[expert * len(models) // made.experts]]
    ]


def _runs(model: Params) -> list[str]:
    return [name for name in model if name.startswith("layers_")]


def _with_ffn(model: Params, ffn: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**value, "ffn": ffn[name]} if name in ffn else value for name, value in model.items()
    }
