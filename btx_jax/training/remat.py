"""Chooses what the backward pass keeps (`compute.remat='auto'`) by the memory of a chip: keeping
more saves computing it again, up to a quarter of a step."""

from collections.abc import Iterator

import jax.numpy as jnp
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.costs.chips import chip

POLICIES = ("ffn", "attention", "full")  # the fastest first
# On a v6e, reading gate and up products takes as long as making them again (docs/tpu.md).
SLOWER = {"TPU v6 lite": ("ffn",)}  # device kind -> policies that do not pay
FREE = 0.25  # share of a chip's memory for what is not estimated: other temporaries, held-out loss


def chosen_remat(
    model: ModelConfig,
    compute: ComputeConfig,
    train: TrainConfig,
    mesh: Mesh,
    sequence_length: int,
    state_bytes: int,
    trained_bytes: int,
) -> str:
    """The fastest policy whose estimated memory leaves FREE of a chip's; `full` where the chip's
    memory is not known, as on CPUs.

    state_bytes, trained_bytes: of parameters and moments, and of the trained parameters alone, on
    one device.
    """
    device_kind = mesh.devices.flat[0].device_kind
    known = chip(device_kind)
    if known is None or not known.memory:
        return "full"
    tensor = mesh.shape["tensor"]
    tokens = train.batch_size // train.accumulate * sequence_length * tensor / mesh.size
    size = jnp.dtype(compute.dtype).itemsize
    gradients = 2 * trained_bytes  # a micro-batch's, and their sums
    copies = trained_bytes * size / 4
    head = 2 * model.vocab_size * model.d_model * (size + 4) / tensor  # gathered, with its gradient
    room = (1 - FREE) * known.memory - state_bytes - gradients - copies - head
    slower = SLOWER.get(device_kind, ())
    for policy in (policy for policy in POLICIES if policy not in slower):
        kept = sum(
            length * sum(_widths(model, spec, compute, policy, tensor))
            for _, length, spec in model.runs()
        )
        if tokens * size * kept <= room:
            return policy
    return "full"


def _widths(
    model: ModelConfig, spec: LayerSpec, compute: ComputeConfig, policy: str, tensor: int
) -> Iterator[float]:
    """Numbers per token and layer that are kept on one device."""
    yield model.d_model  # the layer's input
    if policy == "full":
        return
    heads = 2 * model.heads + 2 * model.kv_heads  # queries, output, keys, values
    yield model.d_model + heads * model.head_dim / tensor
    if policy == "ffn":
        spread = compute.capacity_factor if compute.dispatch == "einsum" else 2.0
        copies = spec.k * spread if spec.experts else 1.0
        dense = spec.shared_d_ff + spec.anchor * spec.d_ff
        yield 2 * (copies * spec.d_ff + dense) / tensor
