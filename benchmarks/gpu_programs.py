"""Training steps compiled for H100s, on a machine without a GPU: memory, and the kernels called.

    pip install -e '.[cuda]' nvidia-cuda-nvcc
    python benchmarks/gpu_programs.py

A dense Llama of 1.2B parameters and a mixture of four of them, in bfloat16, on one H100 and on
eight, with and without kernels for GPUs. Nothing is timed here (train_step.py does, on a GPU): XLA
estimates no times for GPUs, and without one chooses the tiles of matmuls by rules instead of by
trials.
"""

import dataclasses
import os
import re
from collections import Counter

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import lower_train_step

# From NVIDIA's data sheet, and the compiler's own description of this card.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
DENSE = ModelConfig(  # Llama 3.2 1B
    vocab_size=128_256, layers=16, d_model=2048, d_ff=8192, heads=32, kv_heads=8, head_dim=64,
    context=4096, tied_head=True,
)  # fmt: skip
MODELS = {
    "dense, 1.2B": DENSE,
    "mixture of 4, top-2, ragged": dataclasses.replace(DENSE, moe=MoEConfig((4,) * DENSE.layers)),
}
ROWS, LENGTH = 4, 4096  # of each GPU
GIB = 2**30


def as_if_on(devices) -> None:
    """Let jax choose kernels for these devices."""
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    jax.devices = lambda *_: devices


def main() -> None:
    print(f"{'':30} {'GPUs':>4} {'kernels':8} {'held':>6} {'beside':>7}  calls")
    for name, model in MODELS.items():
        for count in (1, 8):
            grid = f"1x1x{count}"
            topology = topologies.get_topology_desc(grid, "cuda", topology=grid, target_config=H100)
            as_if_on(topology.devices)
            for kernels in ("xla", "cuda"):
                compute = ComputeConfig(remat="full", kernels=kernels, dispatch="ragged")
                train = TrainConfig(steps=100, batch_size=ROWS * count)
                mesh = make_mesh((1, count, 1, 1), topology.devices)
                (part,) = lower_train_step(model, compute, train, mesh, LENGTH)
                program = part.program.compile()
                memory = program.memory_analysis()
                found = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
                calls = ", ".join(f"{number} {call}" for call, number in Counter(found).items())
                held, beside = memory.argument_size_in_bytes, memory.temp_size_in_bytes
                print(
                    f"{name:30} {count:4} {kernels:8} {held / GIB:6.1f} {beside / GIB:7.1f}"
                    f"  {calls}",
                    flush=True,
                )


if __name__ == "__main__":
    jax.devices()  # plugins register themselves
    main()
