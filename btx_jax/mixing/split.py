"""Feed-forward blocks cut along d_ff and put together anew, before they are mixed (BTX section 4.4,
"split" and "blend")."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


def split_ffn(ffn: Mapping[str, jax.Array], chunks: int) -> dict[str, jax.Array]:
    """{gate, up: [L, D, F], down: [L, F, D]} -> {gate, up: [L, C, D, F / C], down: [L, C, F / C,
    D]}.

    SwiGLU acts on each hidden unit alone, so the outputs of all C chunks, each at weight 1, add up
    to the block's. Raises ValueError when chunks does not divide F.
    """
    hidden = ffn["gate"].shape[-1]
    if hidden % chunks:
        raise ValueError(f"d_ff={hidden} is not divisible into {chunks} chunks")

    def cut(name: str, leaf: jax.Array) -> jax.Array:
        if name == "down":
            return leaf.reshape(leaf.shape[0], chunks, hidden // chunks, leaf.shape[2])
        return leaf.reshape(*leaf.shape[:2], chunks, hidden // chunks).swapaxes(1, 2)

    return {name: cut(name, leaf) for name, leaf in ffn.items()}


def split_models(models: Sequence[Params], chunks: int) -> list[dict[str, Any]]:
    """N dense trees -> N C trees with d_ff / C, model by model: `mix_params` makes a mixture of N C
    smaller experts of them."""
    parts = [
        {run: split_ffn(model[run]["ffn"], chunks) for run in _runs(model)} for model in models
    ]
    return [
        _with_ffn(
            model,
            {run: {name: leaf[:, c] for name, leaf in ffn.items()} for run, ffn in part.items()},
        )
        for model, part in zip(models, parts, strict=True)
        for c in range(chunks)
    ]


def blend_models(models: Sequence[Params]) -> list[dict[str, Any]]:
    """N dense trees -> N trees of the same shapes, the n-th with the n-th of N chunks of every
    model's feed-forwards, in model order."""
    count = len(models)
    parts = [{run: split_ffn(model[run]["ffn"], count) for run in _runs(model)} for model in models]
    axis = {"gate": 2, "up": 2, "down": 1}

    def blended(n: int, run: str) -> dict[str, jax.Array]:
        return {
            name: jnp.concatenate([part[run][name][:, n] for part in parts], axis)
            for name, axis in axis.items()
        }

    return [
        _with_ffn(model, {run: blended(n, run) for run in _runs(model)})
        for n, model in enumerate(models)
    ]


def _runs(model: Params) -> list[str]:
    return [name for name in model if name.startswith("layers_")]


def _with_ffn(model: Params, ffn: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**value, "ffn": ffn[name]} if name in ffn else value for name, value in model.items()
    }
