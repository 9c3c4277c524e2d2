"""Routing: which experts a token goes to, and with what weight (BTX section 3.2 and variants).
Shape legend: layers.py."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from btx_jax.config.model_config import LayerSpec
from btx_jax.parallel.sharding import shard


class Choice(NamedTuple):
    """Each token's experts, best first. Padding has gate 0 and index E, which is not an expert."""

    gate_GSK: jax.Array
    index_GSK: jax.Array
    probs_GSE: jax.Array  # softmax over all experts


class RoutingStats(NamedTuple):
    """Statistics of one MoE layer over the valid tokens of the whole (global) batch.

    load_E: share of (token, choice) pairs per expert, sums to 1. balance_loss: E sum_i u_i p_i, 1.0
    when uniform, E at collapse (BTX section 3.2 without alpha). gate_load_E: u, the mean gate of
    each expert. entropy: of the full softmax, in nats, mean over tokens. dropped: share of pairs
    without a slot. choice: every token's experts, if the model has keep_choices set.
    """

    load_E: jax.Array
    gate_load_E: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    choice: Choice | None = None


def feed_forward_routing(stats: Any) -> dict[str, RoutingStats]:
    """Statistics of a `Llama`'s routers that choose feed-forwards: run -> RoutingStats."""
    return {name: values for name, values in stats.items() if "/" not in name}


def lora_routing(stats: Any) -> dict[str, RoutingStats]:
    """Statistics of the routers that choose LoRA experts: run/map -> RoutingStats."""
    return {name: values for name, values in stats.items() if "/" in name}


def gumbel_temperature(step: jax.Array) -> jax.Array:
    """tau = max(0.5, exp(-1e-4 t)): 1 at the start, 0.5 from step 6932 on (the formula printed in
    the paper lacks the exp)."""
    return jnp.maximum(0.5, jnp.exp(-1e-4 * step.astype(jnp.float32)))


def route(
    logits_GSE: jax.Array,
    valid_GS: jax.Array,
    spec: LayerSpec,
    noise_GSE: jax.Array | None,
    step: jax.Array,
) -> Choice:
    """Router logits (float32) -> Choice.

    top_k: SoftMax(TopK(logits)), or TopK(SoftMax(logits)) if gates are not renormalised. switch:
    the best expert, weighted by its full-softmax probability. soft: all experts, full softmax.
    sample_top1: with `noise_GSE`, Gumbel-distributed (training), the largest of a Gumbel-softmax
    sample, which keeps its weight; without it (inference), the best expert with weight 1.
    """
    chex.assert_rank([logits_GSE, valid_GS], [3, 2])
    chex.assert_equal_shape_prefix([logits_GSE, valid_GS], 2)
    chex.assert_type([logits_GSE, valid_GS], [jnp.float32, bool])
    experts = logits_GSE.shape[-1]
    probs_GSE = jax.nn.softmax(logits_GSE)
    if spec.routing == "top_k":
        top_GSK, index_GSK = jax.lax.top_k(logits_GSE, spec.k)
        gate_GSK = (
            jax.nn.softmax(top_GSK)
            if spec.renormalise
            else jnp.take_along_axis(probs_GSE, index_GSK, axis=-1)
        )
    elif spec.routing == "soft":
        gate_GSK, index_GSK = jax.lax.top_k(probs_GSE, experts)
    elif spec.routing == "switch":
        gate_GSK, index_GSK = jax.lax.top_k(probs_GSE, 1)
    elif spec.routing == "sample_top1" and noise_GSE is not None:
        noisy_GSE = logits_GSE + noise_GSE
        gate_GSK, index_GSK = jax.lax.top_k(jax.nn.softmax(noisy_GSE / gumbel_temperature(step)), 1)
    elif spec.routing == "sample_top1":
        top_GSK, index_GSK = jax.lax.top_k(logits_GSE, 1)
        gate_GSK = jnp.ones_like(top_GSK)
    else:
        raise ValueError(f"unknown routing {spec.routing!r}")
    valid_GS1 = valid_GS[..., None]
    return Choice(
        jnp.where(valid_GS1, gate_GSK, 0.0), jnp.where(valid_GS1, index_GSK, experts), probs_GSE
    )


def without_anchor(choice: Choice, experts: int) -> tuple[Choice, jax.Array]:
    """(the choice restricted to the experts, with index E for the anchor; the anchor's gate [G,
    S])."""
    gate_GS = jnp.where(choice.index_GSK == experts, choice.gate_GSK, 0).sum(-1)
    return choice._replace(index_GSK=jnp.minimum(choice.index_GSK, experts)), gate_GS


def statistics(
    logits_GSE: jax.Array, choice: Choice, valid_GS: jax.Array, dropped: jax.Array
) -> RoutingStats:
    """RoutingStats over valid tokens, before any are dropped. A batch of only padding gives
    zeros."""
    experts = logits_GSE.shape[-1]
    tokens = jnp.maximum(valid_GS.sum(), 1)
    chosen_GSKE = jax.nn.one_hot(choice.index_GSK, experts)
    load_E = chosen_GSKE.sum((0, 1, 2)) / (tokens * choice.index_GSK.shape[-1])
    u_E = jnp.einsum("gsk,gske->e", choice.gate_GSK, chosen_GSKE) / tokens
    p_E = jnp.where(valid_GS[..., None], choice.probs_GSE, 0).sum((0, 1)) / tokens
    log_z_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
    entropy_GS = log_z_GS - (choice.probs_GSE * logits_GSE).sum(-1)
    return RoutingStats(
        load_E=load_E,
        gate_load_E=u_E,
        entropy=jnp.where(valid_GS, entropy_GS, 0).sum() / tokens,
        dropped=dropped,
        balance_loss=experts * (u_E * p_E).sum(),
        z_loss=jnp.where(valid_GS, log_z_GS**2, 0).sum() / tokens,
    )


def capacity(tokens_per_group: int, experts: int, k: int, factor: float) -> int:
    """Slots per expert and group. With factor = experts / k, no token is ever dropped."""
    return min(tokens_per_group, max(4, math.ceil(factor * k * tokens_per_group / experts)))


def place(choice: Choice, experts: int, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choice -> (dispatch_GSEC 0/1, gate_GEC of each slot's token, share of (token, choice) pairs
    dropped).

    All first choices of a group are placed before any second choice, so that a crowded expert drops
    its weakest claims. With two tokens, one slot and choices [0, 1] and [1, 3]: token 0 takes
    expert 0, token 1 takes expert 1, then token 0 finds expert 1 full and keeps only expert 0; its
    gate is not renormalised.
    """
    chex.assert_rank([choice.gate_GSK, choice.index_GSK], 3)
    chex.assert_equal_shape([choice.gate_GSK, choice.index_GSK])
    chex.assert_type(choice.index_GSK, int)
    groups, tokens, k = choice.index_GSK.shape
    chosen_GSKE = jax.nn.one_hot(choice.index_GSK, experts, dtype=jnp.int32)
    flat_GNE = chosen_GSKE.swapaxes(1, 2).reshape(
        groups, k * tokens, experts
    )  # first choices of the whole group, then second
    slot_GNE = (
        flat_GNE.cumsum(axis=1) * flat_GNE - 1
    )  # -1 where not chosen: one_hot gives a row of zeros for it
    slot_GKSE = slot_GNE.reshape(groups, k, tokens, experts)
    dispatch_GSEC = jnp.zeros((groups, tokens, experts, slots), jnp.float32)
    gate_GEC = jnp.zeros((groups, experts, slots), jnp.float32)
    for choice_number in range(k):  # one [G, S, E, C] at a time instead of [G, S, K, E, C]
        place_GSEC = jax.nn.one_hot(slot_GKSE[:, choice_number], slots, dtype=jnp.float32)
        dispatch_GSEC += place_GSEC
        gate_GEC += jnp.einsum(
            "gsec,gs->gec", place_GSEC, choice.gate_GSK[:, :, choice_number], precision="highest"
        )
    # Without these constraints the compiler shards the mask by expert and gathers every token.
    dispatch_GSEC = shard(dispatch_GSEC, "group", None, None, None)
    gate_GEC = shard(gate_GEC, "group", None, None)
    kept = jnp.minimum(chosen_GSKE.sum((1, 2)), slots).sum()
    return dispatch_GSEC, gate_GEC, 1 - kept / jnp.maximum(chosen_GSKE.sum(), 1)
