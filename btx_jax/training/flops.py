"""What a step costs, and what the chip could do."""

import functools
import time

import jax
import jax.numpy as jnp

from btx_jax.config import ModelConfig
from btx_jax.models.llama import parameter_counts

# Dense bfloat16 FLOP/s per chip (jax device), from the vendors' data sheets (cloud.google.com/tpu/docs, nvidia.com).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def train_flops(config: ModelConfig, tokens: int) -> float:
    """6 x active parameters x tokens: forward and backward, without attention scores and without rematerialisation."""
    return 6.0 * parameter_counts(config)[1] * tokens


@functools.cache
def peak_flops_per_device() -> float:
    """Of the local device: from the table, or on a CPU what a float32 1024 x 1024 matmul reaches (the best of ten)."""
    device = jax.local_devices()[0]
    for kind, peak in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(kind):
            return peak
    n = 1024
    matmul = jax.jit(lambda x: x @ x)
    x = matmul(jnp.ones((n, n)) / n).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / len(jax.local_devices())
