"""Initialisation of a new mixture's routers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normal_routers(
    key: jax.Array, runs: Sequence[tuple[str, int, int]], d_model: int, std: float = 0.02
) -> dict[str, jax.Array]:
    """Random routers. runs: (name, layers, experts) of each MoE run -> {name: [layers, d_model,
    experts]}, float32 normal(std).

    Never zero: equal logits would send every token to experts 0..k-1.
    """
    return {
        name: std
        * jax.random.normal(jax.random.fold_in(key, i), (layers, d_model, experts), jnp.float32)
        for i, (name, layers, experts) in enumerate(runs)
    }


def uniform_routers(
    key: jax.Array, runs: Sequence[tuple[str, int, int]], d_model: int, std: float = 0.02
) -> dict[str, jax.Array]:
    """Routers as from `normal_routers`, but uniform around zero with standard deviation `std`."""
    most = std * 3**0.5
    return {
        name: jax.random.uniform(
            jax.random.fold_in(key, i), (layers, d_model, experts), jnp.float32, -most, most
        )
        for i, (name, layers, experts) in enumerate(runs)
    }
