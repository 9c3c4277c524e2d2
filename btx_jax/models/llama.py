"""The model: a Llama, with the variations of its relatives, whose layers are dense or mixtures of
experts. Shape legend: layers.py.

Parameters are plain nested dicts: embed/embedding [V, D]; layers_R/{attention_norm, attention,
ffn_norm, ffn}/... with a leading layer axis, one layers_R per run of equal layers, and
attention_post_norm and ffn_post_norm where a model has norms after its blocks; final_norm/scale
[D]; head/kernel [D, V] unless tied. A dense and an MoE tree differ only under ffn: [L, D, F]
against [L, E, D, F] and a router [L, D, E]. A mixture with a shared expert or an anchor also has
shared_expert/... or anchor/... next to ffn; with an anchor, ffn also has a router_bias [L, E].
"""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.models import cudnn
from btx_jax.models.attention import Attention
from btx_jax.models.layers import (
    After,
    Before,
    Embed,
    FeedForward,
    Head,
    Norm,
    Readout,
    times,
)
from btx_jax.models.leaves import is_router
from btx_jax.models.lora import is_adapter, router_statistics
from btx_jax.models.moe import MoEFeedForward
from btx_jax.models.routing import RoutingStats
from btx_jax.parallel.sequence import TOKENS, exchanged
from btx_jax.parallel.sharding import shard

Params = Mapping[str, Any]

SAVED = {
    "full": (),
    "auto": (),  # where it is not resolved, as outside training steps
    "attention": ("attention", "keys_values"),
    "ffn": ("attention", "keys_values", "ffn"),
    "offload": ("keys_values",),  # small with grouped heads, and needed first
}  # remat policy -> names of the values kept on the device for the backward pass
OFFLOADED = ("input", "attention")  # names of the values kept on the host, with remat="offload"


def remat_policy(remat: str) -> Any:
    """The jax.checkpoint policy of a layer. remat: as in ComputeConfig."""
    policies = jax.checkpoint_policies
    if remat != "offload":
        names = policies.save_only_these_names(*SAVED[remat])
        is_kept = "attention" in SAVED[remat]
        return policies.save_from_both_policies(names, cudnn.is_result) if is_kept else names
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=SAVED[remat],
        names_which_can_be_offloaded=OFFLOADED,
        offload_src="device",
        offload_dst="pinned_host",
    )


class Block(nn.Module):
    """One layer, attention and feed-forward, as the body of the scan over layers."""

    config: ModelConfig
    compute: ComputeConfig
    spec: LayerSpec
    keep_choices: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, RoutingStats]]:
        c, lora, activation = self.config, self.spec.lora, self.spec.activation
        quantize = self.compute.quantize
        x_BTD = checkpoint_name(shard(x_BTD, *TOKENS, None), "input")
        h_BTD = Before(c, name="attention_norm")(x_BTD)
        attention = Attention(
            c, self.spec, self.compute.kernels, quantize=quantize, name="attention"
        )
        y_BTD, logits = attention(h_BTD, segments_BT)
        x_BTD = checkpoint_name(After(c, name="attention_post_norm")(x_BTD, y_BTD), "attention")
        h_BTD = Before(c, name="ffn_norm")(x_BTD)
        if self.spec.experts:
            anchor_BTD = None
            if self.spec.anchor:
                anchor = FeedForward(
                    self.spec.d_ff, activation=activation, quantize=quantize, name="anchor"
                )
                anchor_BTD = anchor(h_BTD)[0]
            y_BTD, routing = MoEFeedForward(
                self.spec.d_ff, self.spec, self.compute, self.keep_choices, name="ffn"
            )(h_BTD, segments_BT > 0, step, anchor_BTD)
            stats = {"": routing}
            if self.spec.shared_d_ff:
                shared = FeedForward(
                    self.spec.shared_d_ff,
                    gated=self.spec.shared_gate,
                    activation=activation,
                    quantize=quantize,
                    name="shared_expert",
                )
                y_BTD += shared(h_BTD)[0]
        else:
            feed_forward = FeedForward(
                self.spec.d_ff,
                c.biases,
                lora=lora,
                activation=activation,
                quantize=quantize,
                name="ffn",
            )
            y_BTD, inner_logits = feed_forward(h_BTD)
            stats, logits = {}, logits | inner_logits
        for target, logits_BTE in logits.items():
            assert lora
            stats[f"/{target}"] = router_statistics(logits_BTE, segments_BT > 0, lora)
        x_BTD = After(c, name="ffn_post_norm")(x_BTD, y_BTD)
        return shard(x_BTD, *TOKENS, None), stats


class Llama(nn.Module):
    """tokens [B, T], segments [B, T] (0 = padding, equal = same document) -> (final hidden states
    [B, T, D], {router: RoutingStats}).

    A router is named after its run (`layers_0`) if it chooses feed-forwards, and after run and map
    (`layers_0/q`) if it chooses LoRA experts; its stats have a leading layer axis. For logits,
    multiply by `head_kernel(params)` and apply `Readout`. keep_choices: whether the stats of
    feed-forwards hold every token's experts. With a "routing" rng, sample_top1 samples; with a
    "dropout" rng, inputs of LoRA experts are dropped; without either, the model is deterministic.
    step: the training step, for sample_top1's temperature.
    """

    config: ModelConfig
    compute: ComputeConfig
    keep_choices: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, segments: jax.Array, step: jax.Array | int = 0
    ) -> tuple[jax.Array, dict[str, RoutingStats]]:
        chex.assert_rank([tokens, segments], 2)
        chex.assert_equal_shape([tokens, segments])
        chex.assert_type([tokens, segments], int)
        c = self.config
        step = jnp.asarray(step)
        tokens, segments = exchanged(tokens), exchanged(segments)
        x_BTD = Embed(c.vocab_size, c.d_model, name="embed")(tokens).astype(self.compute.dtype)
        x_BTD = times(x_BTD, c.embed_scale)
        if not c.tied_head:
            Head(c.vocab_size, c.d_model, name="head")()
        stats: dict[str, RoutingStats] = {}
        for name, length, spec in c.runs():
            block = Block
            if self.compute.remat != "none":
                policy = remat_policy(self.compute.remat)
                block = nn.remat(Block, policy=policy, prevent_cse=False)
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "routing": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=length,
                unroll=min(self.compute.unroll, length),
                metadata_params={nn.PARTITION_NAME: "layer"},
            )
            x_BTD, run_stats = stack(c, self.compute, spec, self.keep_choices, name=name)(
                x_BTD, segments, step
            )
            stats |= {name + router: values for router, values in run_stats.items()}
        return exchanged(Norm(c, name="final_norm")(x_BTD)), stats


def head_kernel(params: Params) -> jax.Array:
    """The output projection [D, V], which is the transposed embedding if the head is tied."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T


def logits(params: Params, hidden_BTD: jax.Array, readout: Readout = Readout()) -> jax.Array:
    """Logits [B, T, V] in float32. For a few positions; the training loss works in chunks
    instead."""
    products_BTV = jnp.einsum(
        "btd,dv->btv",
        hidden_BTD,
        head_kernel(params).astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    return readout.logits(products_BTV)


@functools.lru_cache(maxsize=8)
def abstract_params(config: ModelConfig) -> Any:
    """Shapes of the parameters with their logical axis names (boxed), without computing anything.
    The current mesh makes no difference."""
    model = Llama(
        config, ComputeConfig(dtype="float32", remat="none", kernels="xla")
    )  # quickest to trace, and touches no device
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), ())
    ):  # a mesh could not divide the single row
        return jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens, tokens), tokens)[
            "params"
        ]


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, float32, every kernel normal(0.02). They depend only on config and key,
    not on the mesh."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return nn.unbox(
        Llama(config, ComputeConfig(dtype="float32")).init(key, tokens, tokens)["params"]
    )


def leaf_counts(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, int]]:
    """Path of a parameter -> (number of elements, number active for one token). Of E experts, k are
    active; routers and an anchor, which processes every token, are active in full."""
    shapes = nn.unbox(abstract_params(config))
    specs = {name: spec for name, _, spec in config.runs()}
    counts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(str(key.key) for key in path)
        active = leaf.size
        spec = specs.get(names[0], LayerSpec())
        if is_adapter(names) and not is_router(names):
            assert spec.lora
            active = leaf.size * spec.lora.k // spec.lora.experts
        elif spec.experts and names[1] == "ffn" and not is_router(names):
            active = leaf.size * min(spec.k, spec.experts) // spec.experts
        counts[names] = leaf.size, active
    return counts


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(number of parameters, number active for one token), as counted by `leaf_counts`."""
    total, active = zip(*leaf_counts(config).values(), strict=True)
    return sum(total), sum(active)
