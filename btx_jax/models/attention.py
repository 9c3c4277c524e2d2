"""Grouped-query attention with rotary positions, causal and blind across documents. Shape legend:
layers.py."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from btx_jax.config.model_config import LoRASpec, ModelConfig, RopeScaling
from btx_jax.models.layers import Kernel, matmul, normal_param, platform_kernels
from btx_jax.models.lora import Adapted, adapter_params, cut
from btx_jax.models.splash import block_size, splash_attend
from btx_jax.parallel.sharding import all_gather, psum, shard_map


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position, [head_dim / 2], float32. `llama3` as in Llama 3.1: wavelengths above
    original_context / low_freq_factor are slowed by factor, those below original_context /
    high_freq_factor kept, those between interpolated."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        turns = (
            scaling.original_context * frequencies / (2 * math.pi)
        )  # full rotations within the original context
        smooth = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
    return frequencies.astype(np.float32)


def rotate(x_BNTK: jax.Array, angles_TK: jax.Array) -> jax.Array:
    """RoPE in Hugging Face's layout: the first half of the head rotates against the second
    (`rotate_half`). angles: [T, K/2], or [B, 1, T, K/2] where rows differ."""
    cos, sin = jnp.cos(angles_TK), jnp.sin(angles_TK)
    a, b = jnp.split(x_BNTK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTK.dtype)


def query_block(length: int) -> int:
    """Rows of queries computed together: at most 8 blocks a sequence, none under 64 rows."""
    return max(64, math.ceil(length / 8))


def attend(
    q_BNGTK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Softmax attention of G query heads per key head; token t sees s <= t of its own segment.
    Returns [B, N, G, T, K].

    Queries go in blocks that meet only the keys up to their end: the upper triangle, 3/8 to 7/16 of
    the work, is not computed. Scores and softmax are float32. Dividing by the sum after the second
    matmul touches K columns instead of T.
    """
    length = q_BNGTK.shape[-2]
    q = q_BNGTK * q_BNGTK.shape[-1] ** -0.5
    block = query_block(length)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = jnp.einsum(
            "bngtk,bnsk->bngts",
            q[..., start:end, :],
            k_BNSK[..., :end, :],
            preferred_element_type=jnp.float32,
        )
        causal = np.arange(start, end)[:, None] >= np.arange(end)[None, :]
        allowed = causal & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
        scores = scores + jnp.where(allowed, 0.0, -1e30)[:, None, None]
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        summed = jnp.einsum(
            "bngts,bnsk->bngtk",
            weights.astype(v_BNSK.dtype),
            v_BNSK[..., :end, :],
            preferred_element_type=jnp.float32,
        )
        outputs.append((summed / weights.sum(axis=-1, keepdims=True)).astype(v_BNSK.dtype))
    return jnp.concatenate(outputs, axis=-2)


# Keys so far [B, N, K, S], so that CPUs sum side by side as with the values; these [B, N, S, K];
# how many slots of each row are filled [B].
KVCache = tuple[jax.Array, jax.Array, jax.Array]
WEIGHTS = (
    ("embed", "heads"),
    ("embed", "kv_heads"),
    ("embed", "kv_heads"),
    ("heads", "head_dim", "embed"),
)


class Attention(nn.Module):
    """x [B, T, D], segments [B, T] -> ([B, T, D], router logits [B, T, E] of each adapted map).
    kernels: as in ComputeConfig."""

    config: ModelConfig
    kernels: str = "auto"
    lora: LoRASpec | None = None

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
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
        widths = {
            "q": (c.d_model, heads),
            "k": (c.d_model, kv_heads),
            "v": (c.d_model, kv_heads),
            "o": (heads, c.d_model),
        }
        self.adapters = adapter_params(self, self.lora, widths)

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        kernels = platform_kernels(self.kernels)
        adapters = cut(self, self.lora, self.adapters, x_BTD.shape[:2], x_BTD.dtype)

        def local(x_BTD, segments_BT, query_DHK, key_DNK, value_DNK, out_HKD, *adapter_arrays):
            lora = Adapted(self.lora, adapters.restore(adapter_arrays))
            position_T = np.arange(x_BTD.shape[1], dtype=np.float32)
            q_BNGTK, k_BNTK, v_BNTK = self._project(
                x_BTD, position_T, query_DHK, key_DNK, value_DNK, lora
            )
            q_BNGTK, k_BNTK, v_BNTK = (
                checkpoint_name(x, "attention") for x in (q_BNGTK, k_BNTK, v_BNTK)
            )
            if kernels == "xla" or not block_size(x_BTD.shape[1]):
                y_BNGTK = checkpoint_name(attend(q_BNGTK, k_BNTK, v_BNTK, segments_BT), "attention")
            else:
                y_BNGTK = splash_attend(
                    q_BNGTK, k_BNTK, v_BNTK, segments_BT, interpret=kernels == "pallas_interpret"
                )
            y_BTD = self._merge(y_BNGTK, out_HKD, lora)
            return y_BTD, *(lora.logits[target] for target in adapters.routed)

        names, outputs = (
            (("batch",), ("batch",), *WEIGHTS, *adapters.names),
            (("batch",),) * (1 + len(adapters.routed)),
        )
        y_BTD, *logits = shard_map(local, names, outputs)(
            x_BTD, segments_BT, *self._weights(x_BTD.dtype), *adapters.arrays
        )
        return y_BTD, dict(zip(adapters.routed, logits, strict=True))

    def continued(
        self, x_BTD: jax.Array, past: KVCache
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x behind its past -> (y [B, T, D], (keys, values) of both). A row of x begins at slot
        length_B."""
        adapters = cut(self, self.lora, self.adapters, x_BTD.shape[:2], x_BTD.dtype)

        def local(
            x_BTD,
            past_keys_BNKS,
            past_values_BNSK,
            length_B,
            query_DHK,
            key_DNK,
            value_DNK,
            out_HKD,
            *adapter_arrays,
        ):
            lora = Adapted(self.lora, adapters.restore(adapter_arrays))
            position_BT = length_B[:, None] + np.arange(x_BTD.shape[1])
            heads = self._project(x_BTD, position_BT, query_DHK, key_DNK, value_DNK, lora)
            y_BNGTK, keys_BNKS, values_BNSK = _attend_past(
                *heads, past_keys_BNKS, past_values_BNSK, position_BT
            )
            return self._merge(y_BNGTK.astype(x_BTD.dtype), out_HKD, lora), keys_BNKS, values_BNSK

        cached = ("batch", "kv_heads")
        inputs, outputs = (
            (("batch",), cached, cached, ("batch",), *WEIGHTS, *adapters.names),
            (("batch",), cached, cached),
        )
        y_BTD, keys, values = shard_map(local, inputs, outputs)(
            x_BTD, *past, *self._weights(x_BTD.dtype), *adapters.arrays
        )
        return y_BTD, (keys, values)

    def _weights(self, dtype: Any) -> tuple[jax.Array, ...]:
        return tuple(w.astype(dtype) for w in (self.query, self.key, self.value, self.out))

    def _project(
        self,
        x_BTD: jax.Array,
        position: Any,
        query_DHK: jax.Array,
        key_DNK: jax.Array,
        value_DNK: jax.Array,
        lora: Adapted,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The heads of one device, as _rotated_heads gives them."""
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])

        def project(kernel, target):  # [D, N, K] -> [B, T, N K]
            kernel = all_gather(kernel, "embed", axis=0)
            return lora.plus(
                target,
                x_BTD,
                (x_MD @ kernel.reshape(len(kernel), -1)).reshape(*x_BTD.shape[:2], -1),
            )

        return _rotated_heads(
            self.config,
            project(query_DHK, "q"),
            project(key_DNK, "k"),
            project(value_DNK, "v"),
            position,
        )

    def _merge(self, y_BNGTK: jax.Array, out_HKD: jax.Array, lora: Adapted) -> jax.Array:
        """Heads -> [B, T, D], summed over the devices that share them."""
        batch, length = y_BNGTK.shape[0], y_BNGTK.shape[3]
        y_MD = _side_by_side(y_BNGTK)
        out_HKD = all_gather(out_HKD, "embed", axis=2)
        y_BTD = psum(
            (y_MD @ out_HKD.reshape(y_MD.shape[1], -1)).reshape(batch, length, -1), "heads"
        )
        return lora.plus("o", y_MD.reshape(batch, length, -1), y_BTD)


Heads = tuple[jax.Array, jax.Array, jax.Array]  # q [B, N, G, T, K], k and v [B, N, T, K]


def _rotated_heads(
    c: ModelConfig, q_BTX: jax.Array, k_BTX: jax.Array, v_BTX: jax.Array, position: Any
) -> Heads:
    """Heads from projections that hold them side by side, rotated. position: [T] or [B, T]."""
    batch, length, _ = q_BTX.shape
    angles = position[..., None] * rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    angles = angles if angles.ndim == 2 else angles[:, None]  # the same for all heads
    q_BHTK, k_BNTK, v_BNTK = (
        x.reshape(batch, length, -1, c.head_dim).transpose(0, 2, 1, 3)
        for x in (q_BTX, k_BTX, v_BTX)
    )
    q_BHTK, k_BNTK = rotate(q_BHTK, angles), rotate(k_BNTK, angles)
    return q_BHTK.reshape(batch, k_BNTK.shape[1], -1, length, c.head_dim), k_BNTK, v_BNTK


def _side_by_side(y_BNGTK: jax.Array) -> jax.Array:
    """[B T, N G K]"""
    batch, _, _, length, _ = y_BNGTK.shape
    return y_BNGTK.transpose(0, 3, 1, 2, 4).reshape(batch * length, -1)


def _attend_past(
    q_BNGTK: jax.Array,
    k_BNTK: jax.Array,
    v_BNTK: jax.Array,
    keys_BNKS: jax.Array,
    values_BNSK: jax.Array,
    position_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(answers [B, N, G, T, K], keys, values), where new keys and values stand at slots
    position_BT, in the dtype of the old."""
    write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
    q_BNGTK, k_BNTK, v_BNTK = (x.astype(keys_BNKS.dtype) for x in (q_BNGTK, k_BNTK, v_BNTK))
    keys_BNKS = write(keys_BNKS, k_BNTK.swapaxes(2, 3), position_BT[:, 0], 2)
    values_BNSK = write(values_BNSK, v_BNTK, position_BT[:, 0], 1)
    q = q_BNGTK * q_BNGTK.shape[-1] ** -0.5
    scores = jnp.einsum("bngtk,bnks->bngts", q, keys_BNKS, preferred_element_type=jnp.float32)
    seen_BTS = jnp.arange(keys_BNKS.shape[3]) <= position_BT[..., None]
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -1e30), axis=-1)
    return (
        jnp.einsum("bngts,bnsk->bngtk", weights.astype(values_BNSK.dtype), values_BNSK),
        keys_BNKS,
        values_BNSK,
    )


def joint_attention(
    config: ModelConfig, x_BTD: jax.Array, past: KVCache, query_key_value: Kernel, out: Kernel
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention.continued on one device and without LoRA, its first three matmuls as one: columns
    of queries, then keys, then values."""
    past_keys_BNKS, past_values_BNSK, length_B = past
    batch, length, d_model = x_BTD.shape
    ends = np.array([config.heads, config.heads + config.kv_heads]) * config.head_dim
    projected = matmul(x_BTD.reshape(-1, d_model), query_key_value, jnp.float32).reshape(
        batch, length, -1
    )
    position_BT = length_B[:, None] + np.arange(length)
    q_BTX, k_BTX, v_BTX = jnp.split(projected, ends, axis=-1)
    heads = _rotated_heads(config, q_BTX, k_BTX, v_BTX, position_BT)
    y_BNGTK, keys_BNKS, values_BNSK = _attend_past(
        *heads, past_keys_BNKS, past_values_BNSK, position_BT
    )
    return matmul(_side_by_side(y_BNGTK).astype(x_BTD.dtype), out).reshape(x_BTD.shape), (
        keys_BNKS,
        values_BNSK,
    )
