"""Specifications of accelerators: one table for MFU, roofline bounds and the compiler's clock.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (as of 2026), per jax device: a chip, or one
of tpu7x's two cores. One-way rates of links and to the host, and which links wrap around, are from
jax-ml.github.io/scaling-book, "How to think about TPUs"; tpu7x is given v5p's network. The
data-centre network rate is that of a host divided among its chips. GPUs: nvidia.com data sheets,
dense bfloat16.
"""

import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A device's capabilities.

    flops: dense bfloat16 FLOP/s.
    int8: int8 operations/s, as a multiple of flops.
    memory: bytes that a program may use.
    bandwidth: of main memory, bytes/s.
    link: one-way rate of one link to a neighbour, bytes/s.
    network: rate between slices, bytes/s.
    host: one-way rate to the host's memory (PCIe), bytes/s.
    clock: cycles/s, as the compiler counts them.
    array: side of the matrix unit; narrower operands fill it only partly.
    cube: where links wrap around. True: in slices all of whose sides are multiples of 4 (optical
        switches). False: along sides of 16.
    per_chip: devices that share a chip's links.
    """

    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    array: int = 128
    cube: bool = True
    per_chip: int = 1
    host: float = 15e9
    int8: float = 1.0


# jax's device_kind -> Chip. Memory is what the compiler lets a program use. The clock is the rate
# at which fully used matrix units reach peak FLOP/s: 4 of 128 x 128 (v5e), 8 of 128 x 128 (v4,
# v5p), and the equivalent of 4 of 256 x 256 (v6e, a core of tpu7x).
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * GIB, 1.2e12, 45e9, 6.25e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 0.8e12, 45e9, 3.125e9, 1.5e9, cube=False, int8=2),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2.765e12, 90e9, 6.25e9, 1.75e9, int8=2),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1.6e12, 90e9, 12.5e9, 1.75e9, 256, cube=False, int8=2),
    "TPU7x": Chip(1153e12, 94.75 * GIB, 3.69e12, 90e9, 6.25e9, 2.2e9, 256, per_chip=2),
    "NVIDIA A100": Chip(312e12),
    "NVIDIA H100": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}


def chip(device_kind: str) -> Chip | None:
    """The entry of CHIPS whose name is the longest prefix of device_kind; None if there is none."""
    return next(
        (
            c
            for kind, c in sorted(CHIPS.items(), key=lambda item: -len(item[0]))
            if device_kind.startswith(kind)
        ),
        None,
    )


@functools.cache
def peak_flops_per_device() -> float:
    """Peak FLOP/s of a local device: from the table if it is listed there; otherwise (on a CPU)
    measured with a float32 matmul of 1024 x 1024, the best of ten."""
    if known := chip(jax.local_devices()[0].device_kind):
        return known.flops
    n = 1024
    matmul = jax.jit(lambda x: x @ x)
    x = matmul(jnp.ones((n, n)) / n).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / len(jax.local_devices())
