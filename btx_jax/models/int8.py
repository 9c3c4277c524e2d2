"""Training matmuls, optionally with operands rounded to int8, which some TPUs multiply at twice the
rate of bfloat16. Without quantization, each function is the plain gather or matmul.

SwitchBack (Wortsman et al., arXiv 2304.13013): outputs and input gradients are int8 matmuls; kernel
gradients, which are sums over all tokens, are not. A kernel has a single scale, so it can be
rounded while sharded and gathered as int8, in half the bytes. Each row of the other operand has its
own scale.
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
    """A gathered kernel: int8 values [..., D, F] times scale [..., 1, 1]. shard: this device's
    shard of the unrounded kernel, which receives the gradient. name, axis: the logical axis and
    array axis along which it was gathered."""

    values: jax.Array
    scale: jax.Array
    shard: jax.Array
    name: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})


Kernel = jax.Array | Int8Kernel


def gathered(shard: jax.Array, name: str, axis: int, quantize: str) -> Kernel:
    """Inside `shard_map`: gather a kernel whose array axis `axis` is sharded over logical axis
    `name`. quantize: as in ComputeConfig."""
    if quantize == "none":
        return all_gather(shard, name, axis)
    fixed = jax.lax.stop_gradient(shard).astype(jnp.float32)
    largest = pmax(jnp.abs(fixed).max((-2, -1), keepdims=True), name)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    values = jnp.round(fixed / scale).astype(jnp.int8)
    return Int8Kernel(all_gather(values, name, axis), scale, shard, name, axis)


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x @ kernel, [..., M, D] @ [D, F] or [E, M, D] @ [E, D, F]. Not differentiable by JAX for an
    Int8Kernel; `trained_product` and the gated block (layers.py) define the derivative."""
    return _int8_dot(x, kernel, -2) if isinstance(kernel, Int8Kernel) else x @ kernel


def back_product(dy: jax.Array, kernel: Kernel) -> jax.Array:
    """Gradient of `product` with respect to x: dy @ kernel^T."""
    if isinstance(kernel, Int8Kernel):
        return _int8_dot(dy, kernel, -1)
    return dy @ jnp.swapaxes(kernel, -1, -2)


def kernel_gradient(x: jax.Array, dy: jax.Array, kernel: Kernel) -> Any:
    """Gradient of `product` with respect to the kernel, x^T @ dy; for an Int8Kernel, an Int8Kernel
    whose shard is the shard's gradient."""
    gradient = jnp.swapaxes(x, -1, -2) @ dy
    if not isinstance(kernel, Int8Kernel):
        return gradient
    none: Any = np.zeros(kernel.values.shape, jax.dtypes.float0)
    own = psum_scatter(gradient, kernel.name, kernel.axis).astype(kernel.shard.dtype)
    return dataclasses.replace(kernel, values=none, scale=jnp.zeros_like(kernel.scale), shard=own)


def trained_product(x_MD: jax.Array, kernel_DF: Kernel) -> jax.Array:
    """`product`, differentiable; for an Int8Kernel with SwitchBack's derivative."""
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
    """x times the kernel, contracted over the last axis of x and `axis` of the kernel (-1 or -2),
    with x's rows rounded to int8."""
    import qwix  # an optional package

    batch = tuple(range(kernel.values.ndim - 2))
    rows = qwix.quantize(x, jnp.int8, channelwise_axes=range(x.ndim - 1))
    columns = qwix.QArray(kernel.values, kernel.scale.astype(x.dtype))
    contracted = (x.ndim - 1,), (kernel.values.ndim + axis,)
    return qwix.dot_general(rows, columns, (contracted, (batch, batch))).astype(x.dtype)
