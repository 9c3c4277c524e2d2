"""Causal attention on TPUs without a [T, T] array: jax's splash attention kernel. Shape legend:
layers.py."""

import chex
import jax
import numpy as np

from btx_jax.parallel.sequence import order, part, shards
from btx_jax.parallel.sharding import axis_index

LANES = 128  # the kernel's key tiles fill whole vector registers
BLOCK = 1024  # queries by keys per tile, when that divides the sequence
SAVED_NAME = "attention"  # name of the kernel's output and log-sum-exp in remat policies


def block_size(length: int) -> int:
    """The largest multiple of 128 up to BLOCK that divides the sequence; 0 if there is none."""
    return next((size for size in range(BLOCK, 0, -LANES) if length % size == 0), 0)


def shard_block_size(length: int, count: int) -> int:
    """`block_size` for rows divided over `count` devices (parallel/sequence.py): a tile must lie
    within one of a device's two pieces."""
    return block_size(length if count == 1 else length // (2 * count))


def _kernel(splash, masks, heads: int, length: int, window: int, interpret: bool, cap: float):
    """Make the kernel for the queries that this device holds (parallel/sequence.py). length: tokens
    in a whole row."""
    count = shards()
    size = shard_block_size(length, count)
    inner = min(size, 512) if size % 512 == 0 else size
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=inner,
        block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=inner,
        block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
    seen = (
        masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
        if window
        else masks.CausalMask((length, length))
    )
    seen.q_sequence = order(length, count)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=count,
        residual_checkpoint_name=SAVED_NAME,
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )
    if count == 1:
        return kernel

    def own(x: jax.Array) -> jax.Array:  # x: which tiles [heads, T, S] are seen, or positions [T]
        axis = 1 if x.ndim == 3 else 0
        size = x.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(x, axis_index("sequence") * size, size, axis)

    return jax.tree.map(own, kernel)


def assert_heads(
    q_BNGTK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, segments_BS: jax.Array
) -> None:
    """Check the shapes of attention's inputs, whichever kernel computes it."""
    chex.assert_rank(q_BNGTK, 5)
    dims = chex.Dimensions()
    dims["BNGTK"] = q_BNGTK.shape
    dims["S"] = (q_BNGTK.shape[3] * shards(),)
    chex.assert_shape([k_BNSK, v_BNSK], dims["BNSK"])
    chex.assert_shape(segments_BS, dims["BS"])
    chex.assert_type(segments_BS, int)


def splash_attend(
    q_BNGTK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSK: jax.Array,
    segments_BS: jax.Array,
    window: int,
    interpret: bool,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """`attention.attend` by the splash kernel, for the rows and heads of one device. T must be a
    multiple of 128, and so must each of the two pieces if rows are divided over devices."""
    assert_heads(q_BNGTK, k_BNSK, v_BNSK, segments_BS)
    # Imported here because the import is slow and few commands need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, kv_heads, groups, length, head_dim = q_BNGTK.shape
    q_BHTK = (q_BNGTK * np.asarray(scale or head_dim**-0.5, q_BNGTK.dtype)).reshape(
        batch, kv_heads * groups, length, head_dim
    )
    row = k_BNSK.shape[2]
    kernel = _kernel(splash, masks, kv_heads * groups, row, window, interpret, cap)
    segments = splash.SegmentIds(part(segments_BS, axis=1), segments_BS)
    y_BHTK = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(
        q_BHTK, k_BNSK, v_BNSK, segments
    )
    return y_BHTK.reshape(q_BNGTK.shape)
