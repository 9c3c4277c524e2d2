"""How a sequence is cut over the mesh's `context` axis, so that the devices along it share one row.

Under causal attention late tokens see more than early ones: of parts that follow each other, the
last would have nearly twice the mean work, and all others would wait for it. So device i of n holds
two pieces of 2 n: number 2 i, and number 2 n - 1 - 2 i, which stands as far from the end as the
first from the beginning. From consecutive parts to these and back is one exchange of second halves
between i and n - 1 - i, as a row enters the model and as it leaves it.

Keys and values of a whole row are gathered within a layer (Llama 3, arXiv 2407.21783, section
3.3.2); only attention does that. Everything else works on tokens, wherever these are.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.parallel.sharding import all_gather, axis_index, shard_map

AXIS = "context"
TOKENS = ("batch", "sequence")  # logical axes of [B, T, ...]

Array = TypeVar("Array", jax.Array, np.ndarray)


def shards() -> int:
    """Parts that a row falls into under the mesh that the caller has set, 1 outside any."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS]


def exchanged(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...], from the order of the text to that in which devices hold it, or back: they are
    each other's inverse. T must be a multiple of 2 `shards()`."""
    count = shards()
    if count == 1:
        return x_BT

    def local(x_BT):
        first, second = jnp.split(x_BT, 2, axis=1)
        pairs = [(i, count - 1 - i) for i in range(count)]
        return jnp.concatenate([first, jax.lax.ppermute(second, AXIS, pairs)], axis=1)

    return shard_map(local, (TOKENS,), TOKENS)(x_BT)


def order(length: int, count: int) -> np.ndarray:
    """[length]: the position in the text of each token, device by device of `count`."""
    pieces = np.arange(length, dtype=np.int32).reshape(count, 2, -1)
    return np.stack([pieces[:, 0], pieces[::-1, 1]], axis=1).reshape(length)


def part(x: Array, axis: int) -> Array | jax.Array:
    """Inside `shard_map`: what this device holds of an array that lies along a whole row, in the
    order of the text."""
    count = shards()
    if count == 1:
        return x
    index = axis_index("sequence")
    size = x.shape[axis] // (2 * count)
    pieces = [
        jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)
        for number in (2 * index, 2 * count - 1 - 2 * index)
    ]
    return jnp.concatenate(pieces, axis)


def whole(x: jax.Array, axis: int) -> jax.Array:
    """Inside `shard_map`: the row of which each device holds a `part`, in the order of the text."""
    count = shards()
    if count == 1:
        return x
    gathered = all_gather(x, "sequence", axis)
    pieces = gathered.reshape(*x.shape[:axis], count, 2, -1, *x.shape[axis + 1 :])
    first, second = jnp.split(pieces, 2, axis=axis + 1)
    paired = jnp.concatenate([first, jnp.flip(second, axis)], axis=axis + 1)
    return paired.reshape(gathered.shape)


def groups(x_BT: jax.Array, tokens: int) -> jax.Array:
    """[B, T, ...] -> [G, tokens, ...]: the groups of each device, which follow each other in the
    text when `tokens` divides T / (2 shards). Nothing moves between devices."""
    batch, rest = x_BT.shape[0], x_BT.shape[2:]
    parts = x_BT.reshape(batch, shards(), -1, *rest).swapaxes(0, 1)
    return parts.reshape(-1, tokens, *rest)


def ungrouped(x_GS: jax.Array, batch: int) -> jax.Array:
    """`groups` undone: [G, S, ...] -> [batch, T, ...]."""
    rest = x_GS.shape[2:]
    parts = x_GS.reshape(shards(), batch, -1, *rest).swapaxes(0, 1)
    return parts.reshape(batch, -1, *rest)
