"""Context parallelism: how a row is divided over the devices along the mesh's `context` axis.

Under causal attention, late tokens attend to more than early ones. If each of n devices held a
consecutive part, the last would have nearly twice the mean work, and all others would wait for it.
Instead, rows are cut into 2 n pieces, and device i holds pieces 2 i and 2 n - 1 - 2 i: the second
is as far from the end of the row as the first is from its beginning. Converting between this order
and consecutive parts is one exchange of second halves between devices i and n - 1 - i, when a row
enters the model and when it leaves it.

Attention gathers the keys and values of the whole row within each layer (Llama 3, arXiv 2407.21783,
section 3.3.2). Everything else works token by token, wherever the tokens are.
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
    """Number of devices that share a row under the current mesh; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS]


def exchanged(x_BT: jax.Array) -> jax.Array:
    """Reorder [B, T, ...] from the order of the text to the order in which devices hold it, or
    back: the exchange is its own inverse. T must be a multiple of 2 `shards()`."""
    count = shards()
    if count == 1:
        return x_BT

    def local(x_BT):
        first, second = jnp.split(x_BT, 2, axis=1)
        pairs = [(i, count - 1 - i) for i in range(count)]
        return jnp.concatenate([first, jax.lax.ppermute(second, AXIS, pairs)], axis=1)

    return shard_map(local, (TOKENS,), TOKENS)(x_BT)


def order(length: int, count: int) -> np.ndarray:
    """Position in the text of each token of a row, [length], in the order in which `count` devices
    hold the row."""
    pieces = np.arange(length, dtype=np.int32).reshape(count, 2, -1)
    return np.stack([pieces[:, 0], pieces[::-1, 1]], axis=1).reshape(length)


def part(x: Array, axis: int) -> Array | jax.Array:
    """Inside `shard_map`: this device's two pieces of x, whose `axis` runs along a whole row in the
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
    """Inside `shard_map`: gather along `axis` the row of which each device holds a `part`, and put
    it in the order of the text."""
    count = shards()
    if count == 1:
        return x
    gathered = all_gather(x, "sequence", axis)
    pieces = gathered.reshape(*x.shape[:axis], count, 2, -1, *x.shape[axis + 1 :])
    first, second = jnp.split(pieces, 2, axis=axis + 1)
    paired = jnp.concatenate([first, jnp.flip(second, axis)], axis=axis + 1)
    return paired.reshape(gathered.shape)


def groups(x_BT: jax.Array, tokens: int) -> jax.Array:
    """Cut each device's tokens into groups: [B, T, ...] -> [G, tokens, ...]. A group is consecutive
    text if `tokens` divides T / (2 `shards()`). Nothing moves between devices."""
    batch, rest = x_BT.shape[0], x_BT.shape[2:]
    parts = x_BT.reshape(batch, shards(), -1, *rest).swapaxes(0, 1)
    return parts.reshape(-1, tokens, *rest)


def ungrouped(x_GS: jax.Array, batch: int) -> jax.Array:
    """Inverse of `groups`: [G, S, ...] -> [batch, T, ...]."""
    rest = x_GS.shape[2:]
    parts = x_GS.reshape(shards(), batch, -1, *rest).swapaxes(0, 1)
    return parts.reshape(batch, -1, *rest)
