"""Decoding with a key/value cache: prompts of unequal length in one batch, static shapes. Shape
legend: layers.py, and

  S cache slots per sequence

Prompts are left-aligned in their rows. Padding is written to the cache too, but overwritten token
by token before it can be attended to. Layers are applied one at a time with their own parameters: a
scan would copy each layer's weights out of the stack for every token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.models.attention import Attention, KVCache, joint_attention
from btx_jax.models.layers import (
    After,
    Before,
    FeedForward,
    Kernel,
    Norm,
    Readout,
    Transposed,
    joint_swiglu,
    matmul,
    sigmoid_gate,
    times,
)
from btx_jax.models.leaves import computes_in_float32
from btx_jax.models.llama import Params, head_kernel
from btx_jax.models.moe import MoEFeedForward, separate_experts

Weights = tuple[Params, tuple[Params, ...]]  # as `unstack` returns them


class Cache(NamedTuple):
    """Keys and values of every layer. keys [B, N, K, S], values [B, N, S, K]. length_B: number of
    tokens in each row."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array


class _Leaves:
    """A tree from which leaves are taken one by one, so that a leaf that nothing takes raises an
    error (`require_empty`) instead of being dropped silently."""

    def __init__(self, tree: Mapping[str, Any], where: str):
        self._tree, self._where = dict(tree), where

    def take(self, key: str) -> Any:
        return self._tree.pop(key)

    def take_all(self) -> dict[str, Any]:
        taken, self._tree = self._tree, {}
        return taken

    def inside(self, key: str) -> "_Leaves":
        return _Leaves(self.take(key), f"{self._where}/{key}")

    def __contains__(self, key: str) -> bool:
        return key in self._tree

    def require_empty(self) -> None:
        if self._tree:
            raise ValueError(f"{self._where}: decoding has no use for {', '.join(self._tree)}")


# Norms that a layer may have.
NORMS = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")


def _joint_attention(
    leaves: _Leaves, model: ModelConfig, kernel: Callable[..., Kernel]
) -> dict[str, Any]:
    """Attention's weights in the form that `joint_attention` takes."""
    inner = [leaves.take(name).reshape(model.d_model, -1) for name in ("query", "key", "value")]
    made: dict[str, Any] = {
        "query_key_value": kernel(*inner),
        "out": kernel(leaves.take("out").reshape(-1, model.d_model)),
    }
    names = ("query_bias", "key_bias", "value_bias")
    if any(name in leaves for name in names):
        biases = [
            leaves.take(name).reshape(-1) if name in leaves else jnp.zeros(part.shape[1])
            for name, part in zip(names, inner, strict=True)
        ]
        made["query_key_value_bias"] = jnp.concatenate([x.astype(jnp.float32) for x in biases])
    if "out_bias" in leaves:
        made["out_bias"] = leaves.take("out_bias")
    for name in ("query_norm", "key_norm"):
        if name in leaves:
            made[name] = leaves.take(name)["scale"]
    leaves.require_empty()
    return made


def _joint_feed_forward(leaves: _Leaves, kernel: Callable[..., Kernel]) -> dict[str, Any]:
    """A feed-forward's weights in the form that `joint_swiglu` takes, and for a shared expert its
    gate, `router`."""
    gate, up, down = leaves.take("gate"), leaves.take("up"), leaves.take("down")
    made: dict[str, Any] = {"gate_up": kernel(gate, up), "down": kernel(down)}
    if "gate_bias" in leaves or "up_bias" in leaves:
        zeros = jnp.zeros(gate.shape[1])
        biases = [
            leaves.take(name) if name in leaves else zeros for name in ("gate_bias", "up_bias")
        ]
        made["gate_up_bias"] = jnp.concatenate([x.astype(jnp.float32) for x in biases])
    for name in ("down_bias", "router"):
        if name in leaves:
            made[name] = leaves.take(name)
    leaves.require_empty()
    return made


def unstack(params: Params, model: ModelConfig, dtype: str, one_device: bool) -> Weights:
    """(parameters outside the layers, one tree per layer), with matmul kernels in `dtype`.

    On one device, matmuls with the same input are joined, unless LoRA adds to their outputs, and
    experts are separate: each layer has query_key_value [D, (H + 2 N) K] and out [H K, D], and
    gate_up [D, 2 F] and down [F, D], per expert if it has experts. Jit it, so that casts and slices
    fuse.
    """
    # bfloat16 only: in float32, XLA has no fast kernel for a single row.
    transpose = one_device and dtype == "bfloat16" and jax.default_backend() == "cpu"

    def kernel(*parts: jax.Array) -> Kernel:
        joint = jnp.concatenate(parts, axis=-1)
        return Transposed.of(joint) if transpose else joint

    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if computes_in_float32(path) else x.astype(dtype), params
    )
    layers = []
    for name, length, spec in model.runs():
        for i in range(length):
            layer = _Leaves(jax.tree.map(lambda x, i=i: x[i], params[name]), f"{name}[{i}]")
            made = {key: layer.take(key) for key in NORMS if key in layer}
            if one_device and spec.lora is None:
                made["attention"] = _joint_attention(layer.inside("attention"), model, kernel)
            else:
                made["attention"] = layer.take("attention")
            if one_device and spec.experts:
                ffn = layer.inside("ffn")
                gate, up, down = ffn.take("gate"), ffn.take("up"), ffn.take("down")
                made["ffn"] = {
                    "router": ffn.take("router"),
                    **({"router_bias": ffn.take("router_bias")} if spec.anchor else {}),
                    "experts": tuple(
                        (kernel(gate[e], up[e]), kernel(down[e])) for e in range(spec.experts)
                    ),
                }
                ffn.require_empty()
            elif one_device and spec.lora is None:
                made["ffn"] = _joint_feed_forward(layer.inside("ffn"), kernel)
            else:
                made["ffn"] = layer.take("ffn")
            beside = ("shared_expert",) * bool(spec.shared_d_ff) + ("anchor",) * spec.anchor
            for part in beside:
                dense = layer.inside(part)
                made[part] = _joint_feed_forward(dense, kernel) if one_device else dense.take_all()
            layer.require_empty()
            layers.append(made)
    embedding = params["embed"]["embedding"]
    # XLA would convert the whole table to float32 before taking rows; it indexes a table of
    # integers directly.
    if transpose:
        embedding = jax.lax.bitcast_convert_type(embedding, jnp.uint16)
    outer = {
        "embedding": embedding,
        "final_norm": params.get("final_norm", {}),
        "head": kernel(head_kernel(params)),
    }
    return outer, tuple(layers)


def next_logits(model: ModelConfig, weights: Weights, hidden_BD: jax.Array) -> jax.Array:
    """Logits [B, V], in float32."""
    return Readout.of(model).logits(matmul(hidden_BD, weights[0]["head"], jnp.float32))


def empty_cache(model: ModelConfig, dtype: str, batch: int, slots: int) -> Cache:
    """An empty cache. On CPUs it is float32: XLA would convert a whole bfloat16 cache for every
    token, both to write it and to attend to it."""
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
    """Process the next tokens of every row, the first count_B of tokens_BT. Returns (final hidden
    state of each row's last token [B, D], the extended cache).

    A prompt is many tokens with an empty cache; a decoding step is a single token. Rows with count
    0 are unchanged.
    """
    chex.assert_rank([tokens_BT, count_B, cache.length_B], [2, 1, 1])
    chex.assert_equal_shape_prefix([tokens_BT, count_B, cache.length_B], 1)
    chex.assert_type([tokens_BT, count_B, cache.length_B], int)
    outer, layers = weights
    x_BTD = outer["embedding"][tokens_BT]
    x_BTD = (
        jax.lax.bitcast_convert_type(x_BTD, jnp.bfloat16) if x_BTD.dtype == jnp.uint16 else x_BTD
    )
    x_BTD = times(x_BTD, model.embed_scale)
    valid_BT = jnp.arange(tokens_BT.shape[1])[None] < count_B[:, None]
    keys, values = [], []
    before, after, norm = Before(model), After(model), Norm(model)

    def applied(module, params, name, *x_BTD):
        return module.apply({"params": params.get(name, {})}, *x_BTD)

    for number, (spec, params) in enumerate(zip(model.layer_specs(), layers, strict=True)):
        h_BTD = applied(before, params, "attention_norm", x_BTD)
        past = KVCache(
            cache.keys[number], cache.values[number], cache.length_B, cache.length_B + count_B
        )
        if "query_key_value" in params["attention"]:
            y_BTD, (key, value) = joint_attention(model, spec, h_BTD, past, params["attention"])
        else:
            attention = Attention(model, spec, compute.kernels)
            y_BTD, (key, value) = cast(
                Any,
                attention.apply({"params": params["attention"]}, h_BTD, past, method="continued"),
            )
        x_BTD = applied(after, params, "attention_post_norm", x_BTD, y_BTD)
        h_BTD = applied(before, params, "ffn_norm", x_BTD)
        anchor_BTD, activation = None, spec.activation
        if spec.anchor:
            anchor = FeedForward(spec.d_ff, activation=activation)
            anchor_BTD = _dense(anchor, params["anchor"], h_BTD)
        y_BTD = _feed_forward(model, compute, spec, params["ffn"], h_BTD, valid_BT, anchor_BTD)
        if spec.shared_d_ff:
            shared = FeedForward(spec.shared_d_ff, gated=spec.shared_gate, activation=activation)
            y_BTD += _dense(shared, params["shared_expert"], h_BTD)
        x_BTD = applied(after, params, "ffn_post_norm", x_BTD, y_BTD)
        keys.append(key)
        values.append(value)
    last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return applied(norm, outer, "final_norm", last_BD), Cache(
        tuple(keys), tuple(values), cache.length_B + count_B
    )


def _feed_forward(
    model: ModelConfig,
    compute: ComputeConfig,
    spec: LayerSpec,
    params: Params,
    x_BTD: Any,
    valid_BT: jax.Array,
    anchor_BTD: jax.Array | None,
) -> jax.Array:
    if "experts" in params:
        anchor = None if anchor_BTD is None else (params["router_bias"], anchor_BTD)
        return separate_experts(
            x_BTD, valid_BT, params["router"], params["experts"], spec, compute, anchor
        )
    if spec.experts:
        return cast(
            Any,
            MoEFeedForward(spec.d_ff, spec, compute).apply(
                {"params": params}, x_BTD, valid_BT, jnp.int32(0), anchor_BTD
            ),
        )[0]
    module = FeedForward(spec.d_ff, model.biases, lora=spec.lora, activation=spec.activation)
    return _dense(module, params, x_BTD)


def _dense(module: FeedForward, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Apply a dense feed-forward. params: in the form of the module or of `joint_swiglu`."""
    if "gate_up" not in params:
        return cast(Any, module.apply({"params": params}, x_BTD))[0]
    weights = {name: w for name, w in params.items() if name != "router"}
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_BTD = joint_swiglu(x_MD, **weights, activation=module.activation).reshape(x_BTD.shape)
    if module.gated:
        y_BTD = sigmoid_gate(x_BTD, params["router"]).astype(y_BTD.dtype) * y_BTD
    return y_BTD
