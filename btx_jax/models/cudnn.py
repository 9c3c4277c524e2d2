"""Causal attention on NVIDIA GPUs without a [T, T] array of scores per head: cuDNN's flash
attention, through jax.nn. Shape legend: layers.py."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from btx_jax.models.splash import assert_heads
from btx_jax.parallel.sequence import shards

WIDEST = 128  # elements of a head; cuDNN takes multiples of 8 up to here on every GPU since Ampere


def is_result(primitive: Any, *_: Any, **__: Any) -> bool:
    """A jax.checkpoint policy that keeps what cuDNN computes forward: the output and the
    log-sum-exp, which have no names, and which the backward pass would compute again."""
    return "dot_product_attention_fwd" in str(primitive)


def is_possible(length: int, width: int, cap: float, dtype: Any) -> bool:
    """Whether cuDNN computes this attention: whole rows of an even length, in bfloat16, without a
    cap on scores. width: elements of a head."""
    is_shape = width <= WIDEST and width % 8 == 0 and length % 2 == 0
    return is_shape and shards() == 1 and not cap and dtype == jnp.bfloat16


def cudnn_attend(
    q_BNGTK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSK: jax.Array,
    segments_BS: jax.Array,
    window: int,
    scale: float = 0.0,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attention.attend` by cuDNN, for the rows and heads of one device, where `is_possible`. Tiles
    of future tokens and those beyond the window are skipped; documents are masked by a bias of
    [B, 1, T, T]. implementation: as in jax.nn.dot_product_attention; `xla` computes the same
    anywhere."""
    assert_heads(q_BNGTK, k_BNSK, v_BNSK, segments_BS)
    batch, kv_heads, groups, length, width = q_BNGTK.shape
    q_BTHK = q_BNGTK.reshape(batch, kv_heads * groups, length, width).swapaxes(1, 2)
    y_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BNSK.swapaxes(1, 2),
        v_BNSK.swapaxes(1, 2),
        mask=(segments_BS[:, :, None] == segments_BS[:, None, :])[:, None],
        scale=scale or width**-0.5,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return y_BTHK.swapaxes(1, 2).reshape(q_BNGTK.shape)
