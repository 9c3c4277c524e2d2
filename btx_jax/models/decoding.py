"""Decoding with a key/value cache: prompts of unequal length side by side, static shapes. Shape
legend: layers.py, and

  S cache slots per sequence

A prompt stands at the left of its row; its padding is written to the cache too, and overwritten
token by token before it is ever seen.
Layers are applied one by one on their own parameters: a scan would copy each layer's weights out of
the stack for every token.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.models.attention import Attention, joint_attention
from btx_jax.models.layers import FeedForward, Kernel, RMSNorm, Transposed, joint_swiglu, matmul
from btx_jax.models.llama import Params, head_kernel
from btx_jax.models.moe import MoEFeedForward, separate_experts

Weights = tuple[Params, tuple[Params, ...]]  # of unstack


class Cache(NamedTuple):
    """keys [B, N, K, S], values [B, N, S, K]: of each layer. length_B: tokens that each row
    holds."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array


def unstack(params: Params, model: ModelConfig, dtype: str, one_device: bool) -> Weights:
    """(parameters outside the layers, one tree a layer), matmuls' kernels in `dtype`.

    On one device matmuls that read the same rows become one, unless LoRA adds to their answers, and
    experts are separate: of each layer query_key_value [D, (H + 2 N) K] and out [H K, D], gate_up
    [D, 2 F] and down [F, D], of each expert where it has some.

    Jit it, so that casts and slices fuse.
    """
    # In float32 a lone row would meet no fast kernel of XLA's.
    transpose = one_device and dtype == "bfloat16" and jax.default_backend() == "cpu"

    def kernel(*parts: jax.Array) -> Kernel:
        joint = jnp.concatenate(parts, axis=-1)
        return Transposed.of(joint) if transpose else joint

    in_float32 = ("scale", "router")
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key in in_float32 else x.astype(dtype), params
    )
    layers = []
    for name, length, spec in model.runs():
        for i in range(length):
            layer = jax.tree.map(lambda x, i=i: x[i], params[name])
            attention, ffn = layer["attention"], layer["ffn"]
            if one_device and spec.lora is None:
                inner = [
                    attention[name].reshape(model.d_model, -1) for name in ("query", "key", "value")
                ]
                attention = {
                    "query_key_value": kernel(*inner),
                    "out": kernel(attention["out"].reshape(-1, model.d_model)),
                }
            if one_device and spec.experts:
                experts = [
                    [ffn[name][e] for name in ("gate", "up", "down")] for e in range(spec.experts)
                ]
                ffn = {
                    "router": ffn["router"],
                    "experts": tuple(
                        (kernel(gate, up), kernel(down)) for gate, up, down in experts
                    ),
                }
            elif one_device and spec.lora is None:
                ffn = {"gate_up": kernel(ffn["gate"], ffn["up"]), "down": kernel(ffn["down"])}
            layers.append({**layer, "attention": attention, "ffn": ffn})
    embedding = params["embed"]["embedding"]
    # XLA would convert the whole table to float32 before it takes rows; of integers it takes them
    # as they are
    if transpose:
        embedding = jax.lax.bitcast_convert_type(embedding, jnp.uint16)
    outer = {
        "embedding": embedding,
        "final_norm": params["final_norm"],
        "head": kernel(head_kernel(params)),
    }
    return outer, tuple(layers)


def next_logits(weights: Weights, hidden_BD: jax.Array) -> jax.Array:
    """[B, V], in float32."""
    return matmul(hidden_BD, weights[0]["head"], jnp.float32)


def empty_cache(model: ModelConfig, dtype: str, batch: int, slots: int) -> Cache:
    """In float32 on CPUs, where XLA would convert a whole bfloat16 cache for every token, to write
    it and to attend to it."""
    dtype = "float32" if jax.default_backend() == "cpu" else dtype

    def zeros(*shape):
        return tuple(jnp.zeros((batch, model.kv_heads, *shape), dtype) for _ in range(model.layers))

    return Cache(
        zeros(model.head_dim, slots), zeros(slots, model.head_dim), jnp.zeros(batch, jnp.int32)
    )


def forward(
    model: ModelConfig,
    compute: ComputeConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The next tokens of every row, the first count_B of tokens_BT: (final hidden state of the last
    of them [B, D], the longer cache).

    A prompt is a forward of many tokens onto an empty cache, decoding one of a single token. Rows
    with count 0 stay as they are.
    """
    outer, layers = weights
    x_BTD = outer["embedding"][tokens_BT]
    x_BTD = (
        jax.lax.bitcast_convert_type(x_BTD, jnp.bfloat16) if x_BTD.dtype == jnp.uint16 else x_BTD
    )
    valid_BT = jnp.arange(tokens_BT.shape[1])[None] < count_B[:, None]
    keys, values = [], []
    norm: Any = RMSNorm(model.norm_eps)
    for number, (spec, params) in enumerate(zip(model.layer_specs(), layers, strict=True)):
        h_BTD = norm.apply({"params": params["attention_norm"]}, x_BTD)
        past = (cache.keys[number], cache.values[number], cache.length_B)
        if "query_key_value" in params["attention"]:
            y_BTD, (key, value) = joint_attention(model, h_BTD, past, **params["attention"])
        else:
            attention = Attention(model, compute.kernels, spec.lora)
            y_BTD, (key, value) = cast(
                Any,
                attention.apply({"params": params["attention"]}, h_BTD, past, method="continued"),
            )
        x_BTD += y_BTD
        x_BTD += _feed_forward(
            model,
            compute,
            spec,
            params["ffn"],
            norm.apply({"params": params["ffn_norm"]}, x_BTD),
            valid_BT,
        )
        keys.append(key)
        values.append(value)
    last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return norm.apply({"params": outer["final_norm"]}, last_BD), Cache(
        tuple(keys), tuple(values), cache.length_B + count_B
    )


def _feed_forward(
    model: ModelConfig,
    compute: ComputeConfig,
    spec: LayerSpec,
    params: Params,
    x_BTD: Any,
    valid_BT: jax.Array,
) -> jax.Array:
    if "experts" in params:
        return separate_experts(x_BTD, valid_BT, params["router"], params["experts"], spec, compute)
    if spec.experts:
        return cast(
            Any,
            MoEFeedForward(model.d_ff, spec, compute).apply(
                {"params": params}, x_BTD, valid_BT, jnp.int32(0)
            ),
        )[0]
    if "gate_up" in params:
        return joint_swiglu(
            x_BTD.reshape(-1, model.d_model), params["gate_up"], params["down"]
        ).reshape(x_BTD.shape)
    return cast(Any, FeedForward(model.d_ff, spec.lora).apply({"params": params}, x_BTD))[0]
