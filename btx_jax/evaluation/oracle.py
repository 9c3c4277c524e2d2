"""A mixture with oracle routing: every token of a domain is sent to that domain's expert. It shows
what mixing loses even if every token goes to the right expert, and so the most that better routing
could gain.

No router is modified: if all experts are copies of one, it does not matter which are chosen. With
an anchor, which contributes in addition to the chosen experts, the other experts are disabled by
their router biases instead; the result is the expert's original branch.
"""

from typing import Any

import jax.numpy as jnp

from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import ConfigError
from btx_jax.models.llama import Params

SHUT = -1e9  # router bias of a disabled expert


def check(model: ModelConfig, expert: int, key: str) -> None:
    """Raise ConfigError, naming the key, where a layer with experts has no expert of this number,
    or its gates do not sum to one."""
    specs = [spec for spec in model.layer_specs() if spec.experts]
    if not specs:
        raise ConfigError(f"{key}: not a mixture; name one")
    if expert >= (fewest := min(spec.routed for spec in specs)):
        raise ConfigError(
            f"{key}: not every layer has an expert {expert}; use a number below {fewest}"
        )
    if any(spec.routing not in ("top_k", "soft") or not spec.renormalise for spec in specs):
        raise ConfigError(
            f"{key}: its gates do not sum to one, so a single expert would be scaled; name a"
            " mixture with top_k or soft routing"
        )


def told(params: Params, expert: int) -> Params:
    """The mixture's parameters with every expert a copy of one, in feed-forward leaves [L, E, ...].
    With an anchor, the other experts are disabled instead; the last number then selects the anchor,
    with all experts disabled."""

    def copied(ffn: Any) -> Any:
        if "router" not in ffn:
            return ffn
        if "router_bias" in ffn:
            bias_LE = ffn["router_bias"]
            is_own_E = jnp.arange(bias_LE.shape[1]) == expert
            return {**ffn, "router_bias": jnp.where(is_own_E, bias_LE, SHUT)}
        return {
            name: leaf if name == "router" else jnp.broadcast_to(leaf[:, expert, None], leaf.shape)
            for name, leaf in ffn.items()
        }

    return {
        name: {**value, "ffn": copied(value["ffn"])} if name.startswith("layers_") else value
        for name, value in params.items()
    }
