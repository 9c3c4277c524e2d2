"""A mixture whose routers are told: every token of a domain goes to that domain's own expert. What
is lost before any router chooses, and so what routing could gain at most.

No router is forced: where all experts are copies of one, it does not matter which are chosen.
"""

from typing import Any

import jax.numpy as jnp

from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import ConfigError
from btx_jax.models.llama import Params


def check(model: ModelConfig, expert: int, key: str) -> None:
    """Raises ConfigError, naming the key, where a layer with experts has none of this number, or
    gates that do not sum to one."""
    specs = [spec for spec in model.layer_specs() if spec.experts]
    if not specs:
        raise ConfigError(f"{key}: is no mixture; name one")
    if expert >= (fewest := min(spec.experts for spec in specs)):
        raise ConfigError(
            f"{key}: has no expert {expert} in every layer; there are {fewest}, counted from 0"
        )
    if any(spec.routing not in ("top_k", "soft") or not spec.renormalise for spec in specs):
        raise ConfigError(
            f"{key}: its gates do not sum to one, and one expert alone would be scaled by them;"
            " name a mixture with top_k or soft routing"
        )


def told(params: Params, expert: int) -> Params:
    """The mixture's parameters with every expert a copy of one. Of feed-forward leaves
    [L, E, ...]."""

    def copied(run: Any) -> Any:
        if "router" not in run["ffn"]:
            return run
        ffn = {
            name: leaf if name == "router" else jnp.broadcast_to(leaf[:, expert, None], leaf.shape)
            for name, leaf in run["ffn"].items()
        }
        return {**run, "ffn": ffn}

    return {
        name: copied(value) if name.startswith("layers_") else value
        for name, value in params.items()
    }
