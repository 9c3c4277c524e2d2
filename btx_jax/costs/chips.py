"""What accelerators can do, one table for MFU and for rooflines.

TPUs, per chip: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (pages of 2026). Interconnect is one way
over all links of a chip: half of the documented bidirectional figure. Data-centre network is a
host's share per chip. GPUs: nvidia.com data sheets, dense bfloat16.
"""

import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 FLOP/s. memory: bytes a program may use. bandwidth, interconnect,
    network: bytes/s."""

    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    interconnect: float = 0.0
    network: float = 0.0


# jax's device_kind -> Chip. Memory is what the compiler grants a program.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * GIB, 1.2e12, 300e9, 6.25e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 0.8e12, 200e9, 3.125e9),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2.765e12, 600e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1.6e12, 400e9, 12.5e9),
    "NVIDIA A100": Chip(312e12),
    "NVIDIA H100": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}


def chip(device_kind: str) -> Chip | None:
    """The longest name in the table that device_kind starts with."""
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
    """Of the local device: from the table, or on a CPU what a float32 1024 x 1024 matmul reaches
    (the best of ten)."""
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
