"""The Mixture-of-Experts feed-forward block: one router for the whole SwiGLU (BTX section 3.2).
Shape legend: layers.py."""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec
from btx_jax.models.int8 import gathered
from btx_jax.models.layers import (
    Kernel,
    bias_param,
    joint_swiglu,
    normal_param,
    platform_kernels,
    scaled_swiglu,
)
from btx_jax.models.ragged import expert_outputs, ragged_experts, weighted_sum
from btx_jax.models.routing import (
    Choice,
    RoutingStats,
    capacity,
    place,
    route,
    statistics,
    without_anchor,
)
from btx_jax.parallel.sequence import exchanged, groups, shards, ungrouped
from btx_jax.parallel.sharding import psum, shard, shard_map


def einsum_experts(
    x_GSD: jax.Array,
    choice: Choice,
    k: int,
    factor: float,
    gate_EDF,
    up_EDF,
    down_EFD,
    activation: str = "silu",
    quantize: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Apply the experts by GShard dispatch with a capacity: (y_GSD, share of claims dropped). Uses
    two all-to-alls if experts are sharded over the mesh."""
    _, tokens, d_model = x_GSD.shape
    experts = gate_EDF.shape[0]
    dispatch_GSEC, gate_GEC, dropped = place(choice, experts, capacity(tokens, experts, k, factor))
    dispatch_GSEC = dispatch_GSEC.astype(x_GSD.dtype)
    x_EGCD = jnp.einsum("gsd,gsec->egcd", shard(x_GSD, "group", None, None), dispatch_GSEC)
    x_EGCD = shard(x_EGCD, "expert", "expert_group", None, None)
    gate_EGC = shard(gate_GEC.swapaxes(0, 1), "expert", "expert_group", None)

    def local(x_EGCD, gate_EGC, gate_EDF, up_EDF, down_EFD):
        gate_EDF, up_EDF, down_EFD = (
            gathered(w, "expert_embed", axis, quantize)
            for w, axis in ((gate_EDF, 1), (up_EDF, 1), (down_EFD, 2))
        )
        own = x_EGCD.shape[0]
        y_EMD = scaled_swiglu(
            x_EGCD.reshape(own, -1, d_model),
            gate_EGC.reshape(own, -1),
            gate_EDF,
            up_EDF,
            down_EFD,
            activation,
        )
        return psum(y_EMD.reshape(x_EGCD.shape), "hidden")

    into, out, rows = (
        ("expert", "expert_embed", "hidden"),
        ("expert", "hidden", "expert_embed"),
        ("expert", "expert_group"),
    )
    y_EGCD = shard_map(local, (rows, rows, into, into, out), rows)(
        x_EGCD, gate_EGC, gate_EDF, up_EDF, down_EFD
    )
    y_EGCD = shard(y_EGCD, "expert", "expert_group", None, None)
    return shard(jnp.einsum("egcd,gsec->gsd", y_EGCD, dispatch_GSEC), "group", None, None), dropped


def router_logits(
    x_GSD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None = None
) -> jax.Array:
    """Router logits [G, S, E]; with biases [G, S, E + 1], the anchor's last.

    The anchor's logit is always 0: softmax depends only on differences of logits, so a router row
    for the anchor would add nothing.
    """
    if bias_E is None:
        return jnp.einsum("gsd,de->gse", x_GSD.astype(jnp.float32), router_DE, precision="highest")
    # One router row at a time, including the anchor's zeros, so that a mixture's logits equal its
    # branches': a matmul's rounding depends on the number of router rows, and a branch has one.
    x_GSD = x_GSD.astype(jnp.float32)
    rows_EGS = jax.lax.map(
        lambda row_D: jnp.einsum("gsd,d->gs", x_GSD, row_D, precision="highest"),
        jnp.pad(router_DE, ((0, 0), (0, 1))).T,
    )
    return jnp.moveaxis(rows_EGS, 0, -1) + jnp.pad(bias_E, (0, 1))


Expert = tuple[Kernel, Kernel]  # gate_up [D, 2 F] and down [F, D], of joint_swiglu


def separate_experts(
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    router_DE: jax.Array,
    experts: Sequence[Expert],
    spec: LayerSpec,
    compute: ComputeConfig,
    anchor: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The MoE block without a capacity, on one device, for inference; each expert's kernels are
    separate arrays. anchor: (the experts' router biases [E], the anchor's output [B, T, D])."""
    one_token = x_BTD.shape[1] == 1
    logits_BTE = router_logits(x_BTD, router_DE, anchor[0] if anchor else None)
    choice = route(logits_BTE, valid_BT | one_token, spec, None, jnp.int32(0))
    if anchor:
        choice, anchor_gate_BT = without_anchor(choice, spec.experts)
    gate_MK, index_MK = (x.reshape(-1, x.shape[-1]) for x in (choice.gate_GSK, choice.index_GSK))
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    if one_token:
        y_BTD = _few_tokens(x_MD, gate_MK, index_MK, experts, spec.activation)[:, None]
    else:
        kernels = platform_kernels(compute.kernels)
        y_MKD = expert_outputs(
            x_MD, index_MK, len(experts), tuple(experts), kernels, spec.activation
        )
        y_BTD = weighted_sum(y_MKD, gate_MK, spec.sums_to_one).reshape(x_BTD.shape)
    return _plus_anchor(y_BTD, anchor_gate_BT, anchor[1]) if anchor else y_BTD


def _plus_anchor(y_BTD: jax.Array, gate_BT: jax.Array, anchor_BTD: jax.Array) -> jax.Array:
    return y_BTD + gate_BT[..., None].astype(y_BTD.dtype) * anchor_BTD


def _few_tokens(
    x_BD: jax.Array,
    gate_BK: jax.Array,
    index_BK: jax.Array,
    experts: Sequence[Expert],
    activation: str,
) -> jax.Array:
    """The MoE block for a few tokens, where reading weights takes longer than multiplying by them.
    With at most as many claims as experts, only the chosen experts' weights are read. Nothing is
    copied."""
    if index_BK.size <= len(experts):

        def answer(x, experts, e):  # index len(experts): the anchor, which is added elsewhere
            if e == len(experts):
                return jnp.zeros_like(x)
            return _answer(x, experts[e], activation)

        branches = [functools.partial(answer, e=e) for e in range(len(experts) + 1)]
        claims = [
            jax.lax.switch(e, branches, x_BD[b : b + 1], experts)
            for b, row in enumerate(index_BK)
            for e in row
        ]
        return jnp.einsum(
            "bkd,bk->bd",
            jnp.concatenate(claims).reshape(*index_BK.shape, -1),
            gate_BK.astype(x_BD.dtype),
        )
    gate_BE = jnp.einsum(
        "bk,bke->be", gate_BK, jax.nn.one_hot(index_BK, len(experts)), precision="highest"
    )
    y_BED = jnp.stack([_answer(x_BD, expert, activation) for expert in experts], axis=1)
    return jnp.einsum("bed,be->bd", y_BED, gate_BE.astype(x_BD.dtype))


def _answer(x_MD: jax.Array, expert: Expert, activation: str) -> jax.Array:
    gate_up, down = expert
    return joint_swiglu(x_MD, gate_up, down, activation=activation)


class MoEFeedForward(nn.Module):
    """x [B, T, D] -> (y [B, T, D], RoutingStats).

    valid [B, T]: False for padding, which is neither routed nor counted. anchor [B, T, D]: the
    output of the layer's anchor for x, if it has one.
    """

    d_ff: int
    spec: LayerSpec
    compute: ComputeConfig
    keep_choices: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array,
        step: jax.Array,
        anchor_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingStats]:
        chex.assert_rank([x_BTD, valid_BT], [3, 2])
        chex.assert_equal_shape_prefix([x_BTD, valid_BT], 2)
        chex.assert_type(valid_BT, bool)
        batch, length, d_model = x_BTD.shape
        experts, d_ff = self.spec.experts, self.d_ff
        router_DE = normal_param(self, "router", (d_model, experts), ("embed", "router"))
        gate_EDF = normal_param(
            self, "gate", (experts, d_model, d_ff), ("expert", "expert_embed", "hidden")
        )
        up_EDF = normal_param(
            self, "up", (experts, d_model, d_ff), ("expert", "expert_embed", "hidden")
        )
        down_EFD = normal_param(
            self, "down", (experts, d_ff, d_model), ("expert", "hidden", "expert_embed")
        )
        gate_EDF, up_EDF, down_EFD = (w.astype(x_BTD.dtype) for w in (gate_EDF, up_EDF, down_EFD))

        tokens = length // shards()
        if self.compute.dispatch == "einsum":  # ragged dispatch has no groups
            tokens = min(self.compute.group_size, tokens)
        x_GSD, valid_GS = groups(x_BTD, tokens), groups(valid_BT, tokens)
        bias_E = None
        if self.spec.anchor:
            bias_E = bias_param(self, "router_bias", (experts,), ("router",))
        logits_GSE = router_logits(x_GSD, router_DE, bias_E)
        noise_GSE = None
        if self.spec.routing == "sample_top1" and self.has_rng("routing"):
            shape = (batch, length, logits_GSE.shape[-1])
            noise_BTE = jax.random.gumbel(self.make_rng("routing"), shape)
            noise_GSE = groups(exchanged(noise_BTE), tokens)
        choice = own = route(logits_GSE, valid_GS, self.spec, noise_GSE, step)
        if self.spec.anchor:
            own, anchor_gate_GS = without_anchor(choice, experts)
        if self.compute.dispatch == "einsum":
            factor = self.compute.capacity_factor * experts / self.spec.routed
            y_GSD, dropped = einsum_experts(
                x_GSD,
                own,
                self.spec.k,
                factor,
                gate_EDF,
                up_EDF,
                down_EFD,
                self.spec.activation,
                self.compute.quantize,
            )
        else:
            flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
            claims = flat(x_GSD), flat(own.gate_GSK), flat(own.index_GSK)
            y_GSD = ragged_experts(
                *claims,
                gate_EDF,
                up_EDF,
                down_EFD,
                platform_kernels(self.compute.kernels),
                self.spec.sums_to_one,
                self.spec.activation,
            ).reshape(x_GSD.shape)
            dropped = jnp.zeros(())
        stats = statistics(logits_GSE, choice, valid_GS, dropped)
        y_BTD = ungrouped(y_GSD, batch)
        if anchor_BTD is not None:
            y_BTD = _plus_anchor(y_BTD, ungrouped(anchor_gate_GS, batch), anchor_BTD)
        return y_BTD, stats._replace(choice=choice) if self.keep_choices else stats
