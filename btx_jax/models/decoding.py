"""Decoding with a key/value cache: prompts of unequal length side by side, static shapes. Shape legend: layers.py, and

  S cache slots per sequence

A prompt stands at the left of its row; its padding is written to the cache too, and overwritten token by token before it is ever seen.
Layers are applied one by one on their own parameters: a scan would copy each layer's weights out of the stack for every token.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from btx_jax.config import ComputeConfig
from btx_jax.model_config import LayerSpec, ModelConfig
from btx_jax.models.attention import Attention
from btx_jax.models.layers import FeedForward, RMSNorm, Transposed, usual
from btx_jax.models.llama import Params, head_kernel
from btx_jax.models.moe import MoEFeedForward, separate_experts

INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "kernel": 1}  # of each kernel, its first ones

Weights = tuple[Params, tuple[Params, ...]]  # of unstack


class Cache(NamedTuple):
    """keys, values: of each layer, [B, N, S, K]. length_B: tokens that each row holds."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array


def unstack(params: Params, model: ModelConfig, dtype: str, one_device: bool) -> Weights:
    """(parameters outside the layers, one tree a layer), matmuls' kernels in `dtype`; on one device those of experts one by one.

    Jit it, so that casts and slices fuse.
    """
    # CPUs read transposed bfloat16 three times as fast. In float32 a lone row would meet no fast kernel of XLA's, nor would maps with LoRA.
    transpose = one_device and dtype == "bfloat16" and jax.default_backend() == "cpu" and model.lora is None

    def held(path: Any, x: jax.Array) -> Any:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        if name in ("scale", "router"):
            return x
        return Transposed.of(x.astype(dtype), INPUT_AXES[name]) if transpose and name in INPUT_AXES else x.astype(dtype)

    layers = []
    for name, length, spec in model.runs():
        for i in range(length):
            layer = jax.tree.map(lambda x, i=i: x[i], params[name])
            if spec.experts and one_device:
                layer["ffn"] = {name: x if name == "router" else tuple(x) for name, x in layer["ffn"].items()}
            layers.append(layer)
    outer = {name: value for name, value in params.items() if not name.startswith("layers_")}
    if not transpose:  # a tied head would be transposed for every token
        outer["head"] = {"kernel": head_kernel(params)}
    return jax.tree_util.tree_map_with_path(held, (outer, tuple(layers)))


def empty_cache(model: ModelConfig, dtype: str, batch: int, slots: int) -> Cache:
    """In float32 on CPUs, where XLA would convert a whole bfloat16 cache for every token, to write it and to attend to it."""
    dtype = "float32" if jax.default_backend() == "cpu" else dtype
    zeros = tuple(jnp.zeros((batch, model.kv_heads, slots, model.head_dim), dtype) for _ in range(model.layers))
    return Cache(zeros, zeros, jnp.zeros(batch, jnp.int32))


def forward(
    model: ModelConfig, compute: ComputeConfig, weights: Weights, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The next tokens of every row, the first count_B of tokens_BT: (final hidden state of the last of them [B, D], the longer cache).

    A prompt is a forward of many tokens onto an empty cache, decoding one of a single token. Rows with count 0 stay as they are.
    """
    outer, layers = weights
    x_BTD = _rows(outer["embed"]["embedding"], tokens_BT).astype(compute.dtype)
    valid_BT = jnp.arange(tokens_BT.shape[1])[None] < count_B[:, None]
    keys, values = [], []
    norm = RMSNorm(model.norm_eps)
    for number, (spec, params) in enumerate(zip(model.layer_specs(), layers, strict=True)):
        h_BTD = norm.apply({"params": params["attention_norm"]}, x_BTD)
        past = (cache.keys[number], cache.values[number], cache.length_B)
        attention = Attention(model, compute.kernels, spec.lora)
        y_BTD, (key, value) = cast(Any, attention.apply({"params": usual(params["attention"])}, h_BTD, past, method="continued"))
        x_BTD += y_BTD
        x_BTD += _feed_forward(model, compute, spec, params["ffn"], norm.apply({"params": params["ffn_norm"]}, x_BTD), valid_BT)
        keys.append(key)
        values.append(value)
    last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden_BD = cast(jax.Array, norm.apply({"params": outer["final_norm"]}, last_BD))
    return hidden_BD, Cache(tuple(keys), tuple(values), cache.length_B + count_B)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    if table_VD.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return table_VD[tokens_BT]
    # As integers: XLA's CPU backend would convert the whole table to float32 first.
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table_VD, jnp.uint16)[tokens_BT], jnp.bfloat16)


def _feed_forward(
    model: ModelConfig, compute: ComputeConfig, spec: LayerSpec, params: Params, x_BTD: Any, valid_BT: jax.Array
) -> jax.Array:
    if not spec.experts:
        return cast(Any, FeedForward(model.d_ff, spec.lora).apply({"params": usual(params)}, x_BTD))[0]
    if isinstance(params["gate"], tuple):
        return separate_experts(x_BTD, valid_BT, params, spec, compute)
    return cast(Any, MoEFeedForward(model.d_ff, spec, compute).apply({"params": params}, x_BTD, valid_BT, jnp.int32(0)))[0]
