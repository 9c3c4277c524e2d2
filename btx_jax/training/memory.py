"""Chooses by a chip's memory what the backward pass keeps (`compute.remat='auto'`) and how many
micro-batches a batch is split into (`train.accumulate=0`). Keeping more saves computing it again,
up to a quarter of a step; a micro-batch of twice the rows gathers weights and scatters gradients
half as often."""

import jax.numpy as jnp
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.costs.chips import chip

POLICIES = ("ffn", "attention", "full")  # the fastest first
# On a v6e, reading gate and up products takes as long as making them again (docs/tpu.md).
SLOWER = {"TPU v6 lite": ("ffn",)}  # device kind -> policies that do not pay
FREE = 0.2  # share of a chip's memory for what is not estimated, and for held-out losses
WORKING = 12  # inputs and hidden products of one layer that exist at once


def chosen(
    model: ModelConfig,
    compute: ComputeConfig,
    train: TrainConfig,
    mesh: Mesh,
    sequence_length: int,
    state_bytes: int,
    trained_bytes: int,
) -> tuple[str, int]:
    """(remat, accumulate), with what the config leaves open decided: the fastest policy, and with
    it the fewest micro-batches, whose estimated memory leaves FREE of a chip's. A second sequence
    for each device is worth more than a faster policy. `full`, and one sequence for each device,
    where the chip's memory is not known, as on CPUs.

    state_bytes, trained_bytes: of parameters and moments, and of the trained parameters alone, on
    one device.
    """
    tensor = mesh.shape["tensor"]
    shards = mesh.size // tensor // mesh.shape["context"]
    counts = [train.accumulate]
    if not train.accumulate:
        rows = train.batch_size // shards  # of a device, in a step
        counts = [count for count in range(rows, 0, -1) if rows % count == 0]
    device_kind = mesh.devices.flat[0].device_kind
    known = chip(device_kind)
    if known is None or not known.memory:
        return "full" if compute.remat == "auto" else compute.remat, counts[0]
    size = jnp.dtype(compute.dtype).itemsize
    gradients = 2 * trained_bytes  # a micro-batch's, and their sums
    copies = trained_bytes * size / 4
    head = 2 * model.vocab_size * model.d_model * (size + 4) / tensor  # gathered, with its gradient
    room = (1 - FREE) * known.memory - state_bytes - gradients - copies - head

    def fits(policy: str, count: int) -> bool:
        tokens = train.batch_size // count * sequence_length * tensor / mesh.size
        widths = [
            (length, _kept(model, spec, compute, policy, tensor), _hidden(spec, compute) / tensor)
            for _, length, spec in model.runs()
        ]
        kept = sum(length * kept for length, kept, _ in widths)
        working = WORKING * (model.d_model + max(hidden for *_, hidden in widths))
        return tokens * size * (kept + working) <= room

    remat = compute.remat
    if remat == "auto":
        usual = [policy for policy in POLICIES if policy not in SLOWER.get(device_kind, ())]
        pairs = ((policy, count) for count in counts[1::-1] for policy in usual)
        remat = next((policy for policy, count in pairs if fits(policy, count)), "full")
    fewer = (count for count in reversed(counts) if remat in POLICIES and fits(remat, count))
    return remat, next(fewer, counts[0])


def _hidden(spec: LayerSpec, compute: ComputeConfig) -> float:
    """Numbers per token that the feed-forwards' hidden layers have, copies for experts included."""
    spread = compute.capacity_factor if compute.dispatch == "einsum" else 2.0
    copies = spec.k * spread if spec.experts else 1.0
    return copies * spec.d_ff + spec.shared_d_ff + spec.anchor * spec.d_ff


def _kept(
    model: ModelConfig, spec: LayerSpec, compute: ComputeConfig, policy: str, tensor: int
) -> float:
    """Numbers per token and layer that are kept on one device: the layer's input, and more."""
    kept = float(model.d_model)
    if policy != "full":
        heads = 2 * model.heads + 2 * model.kv_heads  # queries, output, keys, values
        kept += model.d_model + heads * model.head_dim / tensor
    if policy == "ffn":
        kept += 2 * _hidden(spec, compute) / tensor
    return kept
