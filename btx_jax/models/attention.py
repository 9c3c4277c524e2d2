"""Grouped-query attention with rotary positions, causal and masked across documents. Shape legend:
layers.py."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from btx_jax.config.model_config import LayerSpec, ModelConfig, RopeScaling
from btx_jax.models import cudnn
from btx_jax.models.int8 import gathered, trained_product
from btx_jax.models.layers import (
    Scale,
    bias_param,
    capped,
    effective_scale,
    matmul,
    normal_param,
    platform_kernels,
    scaled_norm,
)
from btx_jax.models.lora import Adapted, adapter_params, cut
from btx_jax.models.splash import assert_heads, shard_block_size, splash_attend
from btx_jax.parallel.sequence import TOKENS, part, shards, whole
from btx_jax.parallel.sharding import psum, shard_map


def rope_frequencies(
    rotated: int, theta: float, scaling: RopeScaling, is_long: bool = False
) -> np.ndarray:
    """Radians per position of the first `rotated` elements of a head, [rotated / 2], float32.

    `llama3` as in Llama 3.1: frequencies with a wavelength above original_context / low_freq_factor
    are divided by factor, those below original_context / high_freq_factor are kept, and those in
    between are interpolated. `yarn` interpolates linearly over the index of the frequency instead.
    is_long: use longrope's factors for documents longer than original_context.
    """
    if scaling.kind == "alpha":
        theta *= scaling.factor ** (rotated / (rotated - 2))
    frequencies = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    turns = (
        scaling.original_context * frequencies / (2 * math.pi)
    )  # full rotations within the original context
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        smooth = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
    elif scaling.kind == "yarn":
        first, last = (
            # index of the frequency that makes beta full turns within the original context
            rotated
            * math.log(scaling.original_context / (beta * 2 * math.pi))
            / (2 * math.log(theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), rotated - 1)
        slowed = np.clip((np.arange(rotated // 2) - first) / max(last - first, 0.001), 0, 1)
        frequencies = frequencies * (1 - slowed + slowed / scaling.factor)
    elif scaling.kind == "longrope":
        # In float32 and in transformers' order of operations: at position 100,000, a difference in
        # the last bit is visible.
        factors = np.array(scaling.long_factors if is_long else scaling.short_factors, np.float32)
        powers = np.float32(theta) ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)
        frequencies = 1 / (factors * powers)
    return frequencies.astype(np.float32)


def rotate(
    x_BNTK: jax.Array, angles_TK: jax.Array, factor: float = 1.0, interleaved: bool = False
) -> jax.Array:
    """Apply RoPE in Hugging Face's layout to the first `rotated` elements of each head, and
    multiply them by factor; the rest of the head is unchanged. Pairs consist of an element of the
    first half and its counterpart in the second (`rotate_half`), or, if interleaved, of two
    neighbours. angles: [T, rotated / 2], or [B, 1, T, rotated / 2] where rows differ."""
    cos, sin = jnp.cos(angles_TK) * factor, jnp.sin(angles_TK) * factor
    rotated, rest = jnp.split(x_BNTK, [2 * angles_TK.shape[-1]], axis=-1)
    if interleaved:
        pairs = rotated.astype(jnp.float32).reshape(*rotated.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = pairs.reshape(rotated.shape).astype(x_BNTK.dtype)
        return jnp.concatenate([turned, rest], axis=-1)
    a, b = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTK.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def changes_with_length(scaling: RopeScaling, longest: int) -> bool:
    """Whether RoPE's frequencies depend on a document's length, for rows of up to `longest`
    tokens."""
    return scaling.kind in ("longrope", "dynamic") and longest > scaling.original_context


def document_lengths(segments_BT: jax.Array) -> jax.Array:
    """For each token, the number of tokens in its row with the same segment, [B, T]."""
    rows = jnp.arange(len(segments_BT))[:, None]
    counts = jnp.zeros((len(segments_BT), segments_BT.shape[1] + 1), jnp.int32)
    return counts.at[rows, segments_BT].add(1)[rows, segments_BT]


def places_in_document(segments_BT: jax.Array) -> jax.Array:
    """Position of each token within its segment, from 0, [B, T]."""
    place_T = jnp.arange(segments_BT.shape[1])
    is_first = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    return place_T - jax.lax.cummax(jnp.where(is_first, place_T, 0), axis=1)


def _angles(
    position: Any, rotated: int, theta: float, scaling: RopeScaling, length: jax.Array | None
) -> Any:
    """Rotation angles in radians, [T, rotated / 2], or [B, T, rotated / 2] if position or length
    has rows. length: tokens in each token's document, if frequencies depend on it."""
    frequencies = rope_frequencies(rotated, theta, scaling)
    if length is None:
        return position[..., None] * frequencies
    if scaling.kind == "longrope":
        is_long = (length > scaling.original_context)[..., None]
        long_angles = position[..., None] * rope_frequencies(rotated, theta, scaling, True)
        return jnp.where(is_long, long_angles, position[..., None] * frequencies)
    # `dynamic`: multiplies theta by s ** (rotated / (rotated - 2)), which divides the last
    # frequency by s.
    ratio = jnp.maximum(length / scaling.original_context, 1)
    slower = jnp.log(scaling.factor * ratio - (scaling.factor - 1))
    powers = np.arange(0, rotated, 2) / max(rotated - 2, 1)
    return position[..., None] * (frequencies * jnp.exp(-slower[..., None] * powers))


def query_block(length: int) -> int:
    """Number of query rows computed together: at most 8 blocks per sequence, at least 64 rows per
    block."""
    return max(64, math.ceil(length / 8))


def attend(
    q_BNGTK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSK: jax.Array,
    segments_BS: jax.Array,
    window: int = 0,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """Softmax attention with G query heads per key head, [B, N, G, T, K]. Token t attends to tokens
    s <= t of its own segment, with a window only to those with t - window < s. scale, cap: as in
    ModelConfig. Keys and values are those of whole rows, queries those of the part of each row that
    this device holds (parallel/sequence.py).

    Queries are processed in blocks. Where rows are not divided over devices, a block reads only the
    keys up to its own end, and from the start of its window: the upper triangle, 3/8 to 7/16 of the
    work, is not computed. Scores and softmax are float32. Dividing by the sum after the second
    matmul touches K columns instead of T.
    """
    assert_heads(q_BNGTK, k_BNSK, v_BNSK, segments_BS)
    length, row = q_BNGTK.shape[-2], k_BNSK.shape[-2]
    position_T, segments_BT = part(np.arange(row), axis=0), part(segments_BS, axis=1)
    q = q_BNGTK * (scale or q_BNGTK.shape[-1] ** -0.5)
    block = query_block(length)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first, last = max(0, start - window + 1) if window else 0, end
        if length < row:  # the block's position in the row is known only at run time
            first, last = 0, row
        scores = jnp.einsum(
            "bngtk,bnsk->bngts",
            q[..., start:end, :],
            k_BNSK[..., first:last, :],
            preferred_element_type=jnp.float32,
        )
        scores = capped(scores, cap)
        distance = position_T[start:end, None] - np.arange(first, last)[None, :]
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        allowed = seen & (segments_BT[:, start:end, None] == segments_BS[:, None, first:last])
        scores = scores + jnp.where(allowed, 0.0, -1e30)[:, None, None]
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        summed = jnp.einsum(
            "bngts,bnsk->bngtk",
            weights.astype(v_BNSK.dtype),
            v_BNSK[..., first:last, :],
            preferred_element_type=jnp.float32,
        )
        outputs.append((summed / weights.sum(axis=-1, keepdims=True)).astype(v_BNSK.dtype))
    return jnp.concatenate(outputs, axis=-2)


class KVCache(NamedTuple):
    """Keys and values of one layer. keys [B, N, K, S]: laid out so that CPUs accumulate over
    contiguous memory, as with the values [B, N, S, K]. length [B]: number of filled slots per row.
    total [B]: the same after the current tokens have been added."""

    keys_BNKS: jax.Array
    values_BNSK: jax.Array
    length_B: jax.Array
    total_B: jax.Array


# Logical axes of attention's parameters; trailing axes that are left out are not sharded.
AXES: Mapping[str, tuple[str, ...]] = {
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "out": ("heads", "head_dim", "embed"),
    "query_bias": ("heads",),
    "key_bias": ("kv_heads",),
    "value_bias": ("kv_heads",),
    "out_bias": ("norm",),
    "query_norm": ("norm",),
    "key_norm": ("norm",),
}
WIDE_NORMS = {"query_norm": ("heads", "head_dim"), "key_norm": ("kv_heads", "head_dim")}
Weights = Mapping[str, jax.Array]  # by the names in AXES, on one device


class Attention(nn.Module):
    """x [B, T, D], segments [B, T] -> ([B, T, D], router logits [B, T, E] of each adapted map that
    has a router). kernels, quantize: as in ComputeConfig."""

    config: ModelConfig
    spec: LayerSpec
    kernels: str = "auto"
    quantize: str = "none"

    def setup(self):
        c = self.config
        self.query = normal_param(
            self, "query", (c.d_model, c.heads, c.head_dim), ("embed", "heads", "head_dim")
        )
        self.key = normal_param(
            self, "key", (c.d_model, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        )
        self.value = normal_param(
            self, "value", (c.d_model, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        )
        self.out = normal_param(
            self, "out", (c.heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed")
        )
        for name, target, heads in (
            ("query_bias", "q", c.heads),
            ("key_bias", "k", c.kv_heads),
            ("value_bias", "v", c.kv_heads),
        ):
            if target in c.biases:
                axes = (*AXES[name], "head_dim")
                setattr(self, name, bias_param(self, name, (heads, c.head_dim), axes))
        if "o" in c.biases:
            self.out_bias = bias_param(self, "out_bias", (c.d_model,), ("norm",))
        if c.qk_norm:
            is_wide = c.qk_norm_kind == "width"
            self.query_norm, self.key_norm = (
                Scale(
                    c,
                    (count, c.head_dim) if is_wide else (c.head_dim,),
                    WIDE_NORMS[name] if is_wide else AXES[name],
                )
                for name, count in (("query_norm", c.heads), ("key_norm", c.kv_heads))
            )
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
        widths = {
            "q": (c.d_model, heads),
            "k": (c.d_model, kv_heads),
            "v": (c.d_model, kv_heads),
            "o": (heads, c.d_model),
        }
        self.adapters = adapter_params(self, self.spec.lora, widths)

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        adapters = cut(self, self.spec.lora, self.adapters, x_BTD.shape[:2], x_BTD.dtype)
        weights = self._weights(x_BTD.dtype)

        def local(x_BTD, segments_BT, *arrays):
            w = dict(zip(weights, arrays, strict=False))
            lora = Adapted(self.spec.lora, adapters.restore(arrays[len(w) :]))
            y_BTD = self._merge(self._attend(x_BTD, segments_BT, w, lora), w, lora)
            return y_BTD, *(lora.logits[target] for target in adapters.routed)

        names, outputs = (
            (TOKENS, TOKENS, *map(self._axes, weights), *adapters.names),
            (TOKENS,) * (1 + len(adapters.routed)),
        )
        y_BTD, *logits = shard_map(local, names, outputs)(
            x_BTD, segments_BT, *weights.values(), *adapters.arrays
        )
        return y_BTD, dict(zip(adapters.routed, logits, strict=True))

    def heads(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Input of the output projection, [B, T, N G K]. For one device, without LoRA."""
        y_BNGTK = self._attend(x_BTD, segments_BT, self._weights(x_BTD.dtype), Adapted(None, {}))
        return _side_by_side(y_BNGTK).reshape(*x_BTD.shape[:2], -1)

    def continued(
        self, x_BTD: jax.Array, past: KVCache
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attention of new tokens x [B, T, D] to the cached ones and to each other: (y [B, T, D],
        (keys, values) including the new ones). Each row of x starts at slot length_B."""
        adapters = cut(self, self.spec.lora, self.adapters, x_BTD.shape[:2], x_BTD.dtype)
        weights = self._weights(x_BTD.dtype)

        def local(x_BTD, keys_BNKS, values_BNSK, length_B, total_B, *arrays):
            w = dict(zip(weights, arrays, strict=False))
            lora = Adapted(self.spec.lora, adapters.restore(arrays[len(w) :]))
            past = KVCache(keys_BNKS, values_BNSK, length_B, total_B)
            position_BT = length_B[:, None] + np.arange(x_BTD.shape[1])
            heads = self._project(x_BTD, position_BT, _lengths(self.spec, past), w, lora)
            y_BNGTK, keys_BNKS, values_BNSK = _attend_past(
                self.config, self.spec, *heads, past, position_BT
            )
            return self._merge(y_BNGTK.astype(x_BTD.dtype), w, lora), keys_BNKS, values_BNSK

        cached = ("batch", "kv_heads")
        inputs, outputs = (
            (
                ("batch",),
                cached,
                cached,
                ("batch",),
                ("batch",),
                *map(self._axes, weights),
                *adapters.names,
            ),
            (("batch",), cached, cached),
        )
        y_BTD, keys, values = shard_map(local, inputs, outputs)(
            x_BTD, *past, *weights.values(), *adapters.arrays
        )
        return y_BTD, (keys, values)

    def _weights(self, dtype: Any) -> dict[str, jax.Array]:
        """The parameters in AXES that the model has: norm scales in float32, the others in
        `dtype`."""
        found = {
            name: getattr(self, name).astype(dtype)
            for name in AXES
            if not name.endswith("norm") and hasattr(self, name)
        }
        if self.config.qk_norm and self.config.norm != "layer":
            found |= {"query_norm": self.query_norm(), "key_norm": self.key_norm()}
        return found

    def _axes(self, name: str) -> tuple[str, ...]:
        is_wide = name in WIDE_NORMS and self.config.qk_norm_kind == "width"
        return WIDE_NORMS[name] if is_wide else AXES[name]

    def _attend(
        self, x_BTD: jax.Array, segments_BT: jax.Array, w: Weights, lora: Adapted
    ) -> jax.Array:
        """Outputs of one device's heads, [B, N, G, T, K]."""
        kernels = platform_kernels(self.kernels)
        segments_BS = whole(segments_BT, axis=1)
        length, window = segments_BS.shape[1], self.spec.window
        window = window if window < length else 0
        scaling, length_BT = self.spec.rope_scaling, None
        if changes_with_length(scaling, length):
            length_BT = part(document_lengths(segments_BS), axis=1)
        position: Any = part(np.arange(length, dtype=np.float32), axis=0)
        is_absolute = scaling.query_growth or self.config.qk_norm_kind == "rotated"
        if is_absolute:  # otherwise only differences of positions matter
            position = part(places_in_document(segments_BS), axis=1).astype(jnp.float32)
        heads = self._project(x_BTD, position, length_BT, w, lora)
        names = "attention", "keys_values", "keys_values"
        q_BNGTK, k_BNTK, v_BNTK = map(checkpoint_name, heads, names)
        k_BNSK, v_BNSK = whole(k_BNTK, axis=2), whole(v_BNTK, axis=2)
        scale, cap = self.config.attention_scale, self.config.attention_cap
        width, dtype = q_BNGTK.shape[-1], q_BNGTK.dtype
        if kernels == "cuda" and cudnn.is_possible(length, width, cap, dtype):
            return cudnn.cudnn_attend(q_BNGTK, k_BNSK, v_BNSK, segments_BS, window, scale)
        if kernels in ("xla", "cuda") or not shard_block_size(length, shards()):
            y_BNGTK = attend(q_BNGTK, k_BNSK, v_BNSK, segments_BS, window, scale, cap)
            return checkpoint_name(y_BNGTK, "attention")
        is_interpreted = kernels == "pallas_interpret"
        return splash_attend(
            q_BNGTK, k_BNSK, v_BNSK, segments_BS, window, is_interpreted, scale, cap
        )

    def _project(
        self, x_BTD: jax.Array, position: Any, length: Any, w: Weights, lora: Adapted
    ) -> "Heads":
        """Queries, keys and values of one device's heads, as `_rotated_heads` returns them."""
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])

        def project(name, target):  # [D, N, K] -> [B, T, N K]
            shard = w[name].reshape(len(w[name]), -1)
            y_MX = trained_product(x_MD, gathered(shard, "embed", 0, self.quantize))
            if f"{name}_bias" in w:
                y_MX += w[f"{name}_bias"].reshape(-1)
            return lora.plus(target, x_BTD, y_MX.reshape(*x_BTD.shape[:2], -1))

        q_BTX, k_BTX, v_BTX = project("query", "q"), project("key", "k"), project("value", "v")
        return _rotated_heads(self.config, self.spec, q_BTX, k_BTX, v_BTX, position, length, w)

    def _merge(self, y_BNGTK: jax.Array, w: Weights, lora: Adapted) -> jax.Array:
        """Apply the output projection: heads -> [B, T, D], summed over the devices that share the
        heads."""
        batch, length = y_BNGTK.shape[0], y_BNGTK.shape[3]
        y_MX = _side_by_side(y_BNGTK)
        out_XD = gathered(w["out"].reshape(y_MX.shape[1], -1), "embed", 1, self.quantize)
        y_BTD = psum(trained_product(y_MX, out_XD).reshape(batch, length, -1), "heads")
        if "out_bias" in w:
            y_BTD += w["out_bias"]
        return lora.plus("o", y_MX.reshape(batch, length, -1), y_BTD)


Heads = tuple[jax.Array, jax.Array, jax.Array]  # q [B, N, G, T, K], k and v [B, N, T, K]


def _lengths(spec: LayerSpec, past: KVCache) -> jax.Array | None:
    """Number of tokens in each row, [B, 1]; None if rotations do not depend on it."""
    if not changes_with_length(spec.rope_scaling, past.values_BNSK.shape[2]):
        return None
    return past.total_B[:, None]


def _rotated_heads(
    c: ModelConfig,
    spec: LayerSpec,
    q_BTX: jax.Array,
    k_BTX: jax.Array,
    v_BTX: jax.Array,
    position: Any,
    length: jax.Array | None,
    w: Weights,
) -> Heads:
    """Split projections [B, T, heads * K] into heads, normalised and rotated. position: [T] or
    [B, T]. length: as in `_angles`."""
    batch, tokens, _ = q_BTX.shape
    q_BHTK, k_BNTK, v_BNTK = (
        x.reshape(batch, tokens, -1, c.head_dim).transpose(0, 2, 1, 3)
        for x in (q_BTX, k_BTX, v_BTX)
    )

    def normed(q_BHTK, k_BNTK):
        if c.qk_norm_kind == "width":
            return (
                _wide_norm(c, q_BHTK, w.get("query_norm"), c.heads, "heads"),
                _wide_norm(c, k_BNTK, w.get("key_norm"), c.kv_heads, "kv_heads"),
            )
        return (
            scaled_norm(c, q_BHTK, w.get("query_norm")),
            scaled_norm(c, k_BNTK, w.get("key_norm")),
        )

    if c.qk_norm and c.qk_norm_kind != "rotated":
        q_BHTK, k_BNTK = normed(q_BHTK, k_BNTK)
    if spec.rope_theta:
        scaling = spec.rope_scaling
        angles = _angles(position, int(c.head_dim * c.rotary), spec.rope_theta, scaling, length)
        angles = angles if angles.ndim == 2 else angles[:, None]  # the same for all heads
        q_BHTK, k_BNTK = (
            rotate(x, angles, scaling.attention_factor, c.rope_interleaved)
            for x in (q_BHTK, k_BNTK)
        )
        if scaling.query_growth:
            turns = jnp.floor(position / scaling.original_context)
            growth_BT = 1 + scaling.query_growth * jnp.log1p(turns)
            q_BHTK *= growth_BT[:, None, :, None].astype(q_BHTK.dtype)
    if c.qk_norm and c.qk_norm_kind == "rotated":
        q_BHTK, k_BNTK = normed(q_BHTK, k_BNTK)
    return q_BHTK.reshape(batch, k_BNTK.shape[1], -1, tokens, c.head_dim), k_BNTK, v_BNTK


def _wide_norm(
    c: ModelConfig, x_BHTK: jax.Array, scale_HK: jax.Array | None, heads: int, name: str
) -> jax.Array:
    """RMSNorm over all heads of a token together. heads: their number over all devices along the
    logical axis `name`."""
    x32 = x_BHTK.astype(jnp.float32)
    total_BT = psum((x32 * x32).sum((1, 3)), name)
    root_BT = jax.lax.rsqrt(total_BT / (heads * c.head_dim) + c.norm_eps)
    y_BHTK = x32 * root_BT[:, None, :, None]
    if scale_HK is not None:
        y_BHTK *= effective_scale(c, scale_HK)[:, None]
    return y_BHTK.astype(x_BHTK.dtype)


def _side_by_side(y_BNGTK: jax.Array) -> jax.Array:
    """Concatenate the heads of each token: [B, N, G, T, K] -> [B T, N G K]."""
    batch, _, _, length, _ = y_BNGTK.shape
    return y_BNGTK.transpose(0, 3, 1, 2, 4).reshape(batch * length, -1)


def _attend_past(
    c: ModelConfig,
    spec: LayerSpec,
    q_BNGTK: jax.Array,
    k_BNTK: jax.Array,
    v_BNTK: jax.Array,
    past: KVCache,
    position_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write the new keys and values to slots position_BT, in the cache's dtype, and attend:
    (outputs [B, N, G, T, K], keys, values)."""
    keys_BNKS, values_BNSK = past.keys_BNKS, past.values_BNSK
    write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
    q_BNGTK, k_BNTK, v_BNTK = (x.astype(keys_BNKS.dtype) for x in (q_BNGTK, k_BNTK, v_BNTK))
    keys_BNKS = write(keys_BNKS, k_BNTK.swapaxes(2, 3), position_BT[:, 0], 2)
    values_BNSK = write(values_BNSK, v_BNTK, position_BT[:, 0], 1)
    q = q_BNGTK * (c.attention_scale or c.head_dim**-0.5)
    scores = jnp.einsum("bngtk,bnks->bngts", q, keys_BNKS, preferred_element_type=jnp.float32)
    scores = capped(scores, c.attention_cap)
    distance_BTS = position_BT[..., None] - jnp.arange(keys_BNKS.shape[3])
    seen_BTS = distance_BTS >= 0
    if spec.window:
        seen_BTS &= distance_BTS < spec.window
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -1e30), axis=-1)
    return (
        jnp.einsum("bngts,bnsk->bngtk", weights.astype(values_BNSK.dtype), values_BNSK),
        keys_BNKS,
        values_BNSK,
    )


def joint_attention(
    config: ModelConfig, spec: LayerSpec, x_BTD: jax.Array, past: KVCache, w: Mapping[str, Any]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`Attention.continued` on one device and without LoRA, with its first three matmuls joined:
    columns of queries, then keys, then values. w: query_key_value, out and, where the model has
    them, query_key_value_bias, out_bias, query_norm, key_norm."""
    batch, length, d_model = x_BTD.shape
    ends = np.array([config.heads, config.heads + config.kv_heads]) * config.head_dim
    projected_MX = matmul(x_BTD.reshape(-1, d_model), w["query_key_value"], jnp.float32)
    if "query_key_value_bias" in w:
        projected_MX += w["query_key_value_bias"]
    position_BT = past.length_B[:, None] + np.arange(length)
    q_BTX, k_BTX, v_BTX = jnp.split(projected_MX.reshape(batch, length, -1), ends, axis=-1)
    lengths_B1 = _lengths(spec, past)
    heads = _rotated_heads(config, spec, q_BTX, k_BTX, v_BTX, position_BT, lengths_B1, w)
    y_BNGTK, keys_BNKS, values_BNSK = _attend_past(config, spec, *heads, past, position_BT)
    y_MD = matmul(_side_by_side(y_BNGTK).astype(x_BTD.dtype), w["out"])
    if "out_bias" in w:
        y_MD += w["out_bias"].astype(y_MD.dtype)
    return y_MD.reshape(x_BTD.shape), (keys_BNKS, values_BNSK)
