"""Matmuls of training, with factors rounded to int8 where asked to: TPUs multiply those at twice
the rate. Without, each function is the plain gather or product.

SwitchBack (Wortsman et al., arXiv 2304.13013): outputs and the gradients of inputs are int8
products; the gradients of kernels, sums over all tokens, are not. Kernels have one scale, so that
they are rounded where they are sharded and gathered as int8, in half the bytes; rows of the other
factor have one each.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.parallel.sharding import all_gather, pmax, psum_scatter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A gathered kernel: values [..., D, F] of int8, times scale [..., 1, 1]. shard: what one
    device has of the kernel, to which the gradient belongs. name, axis: as it was gathered."""

    values: jax.Array
    scale: jax.Array
    shard: jax.Array
    name: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})


Kernel = jax.Array | Int8Kernel


def gathered(shard: jax.Array, name: str, axis: int, quantize: str) -> Kernel:
    """Inside `shard_map`: the kernel of which each device has a shard along `axis`, by logical axis
    `name`. quantize: as in ComputeConfig."""
    if quantize == "none":
        return all_gather(shard, name, axis)
    fixed = jax.lax.stop_gradient(shard).astype(jnp.float32)
    largest = pmax(jnp.abs(fixed).max((-2, -1), keepdims=True), name)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    values = jnp.round(fixed / scale).astype(jnp.int8)
    return Int8Kernel(all_gather(values, name, axis), scale, shard, name, axis)


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x @ kernel, [..., M, D] @ [D, F] or [E, M, D] @ [E, D, F]. JAX cannot derive that of an
    Int8Kernel; `trained_product` and the gated block (layers.py) do."""
    return _int8_dot(x, kernel, -2) if isinstance(kernel, Int8Kernel) else x @ kernel


def back_product(dy: jax.Array, kernel: Kernel) -> jax.Array:
    """The gradient of `product`'s x: dy @ kernel^T."""
    if isinstance(kernel, Int8Kernel):
        return _int8_dot(dy, kernel, -1)
    return dy @ jnp.swapaxes(kernel, -1, -2)


def kernel_gradient(x: jax.Array, dy: jax.Array, kernel: Kernel) -> Any:
    """The gradient of `product`'s kernel, x^T @ dy; of an Int8Kernel, with that of its shard."""
    gradient = jnp.swapaxes(x, -1, -2) @ dy
    if not isinstance(kernel, Int8Kernel):
        return gradient
    none: Any = np.zeros(kernel.values.shape, jax.dtypes.float0)
    own = psum_scatter(gradient, kernel.name, kernel.axis).astype(kernel.shard.dtype)
    return dataclasses.replace(kernel, values=none, scale=jnp.zeros_like(kernel.scale), shard=own)


def trained_product(x_MD: jax.Array, kernel_DF: Kernel) -> jax.Array:
    """`product` with a derivative, for an Int8Kernel SwitchBack's."""
    if isinstance(kernel_DF, Int8Kernel):
        return _switchback(x_MD, kernel_DF)
    return x_MD @ kernel_DF


@jax.custom_vjp
def _switchback(x_MD: jax.Array, kernel_DF: Int8Kernel) -> jax.Array:
    return product(x_MD, kernel_DF)


_switchback.defvjp(
    lambda x, kernel: (product(x, kernel), (x, kernel)),
    lambda saved, dy: (back_product(dy, saved[1]), kernel_gradient(saved[0], dy, saved[1])),
)


def _int8_dot(x: jax.Array, kernel: Int8Kernel, axis: int) -> jax.Array:
    """x times the kernel over the last axis of x and an axis of the kernel."""
    import qwix  # an optional package

    batch = tuple(range(kernel.values.ndim - 2))
    rows = qwix.quantize(x, jnp.int8, channelwise_axes=range(x.ndim - 1))
    columns = qwix.QArray(kernel.values, kernel.scale.astype(x.dtype))
    contracted = (x.ndim - 1,), (kernel.values.ndim + axis,)
    return qwix.dot_general(rows, columns, (contracted, (batch, batch))).astype(x.dtype)
