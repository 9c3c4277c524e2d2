"""Choose the remat policy (`compute.remat='auto'`) and the number of micro-batches
(`train.accumulate=0`) from the chip's memory. Keeping more activations saves recomputing them, up
to a quarter of a step; doubling the rows of a micro-batch halves how often weights are gathered and
gradients scattered."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.costs.chips import GIB, chip
from btx_jax.models import cudnn

POLICIES = ("ffn", "attention", "full")  # fastest first
# On a v6e, reading the gate and up products takes as long as recomputing them (docs/tpu.md).
SLOWER = {"TPU v6 lite": ("ffn",)}  # device kind -> policies that do not pay off
FREE = 0.2  # share of a chip's memory reserved for held-out losses and whatever is not estimated
# Copies of one layer's input and hidden activations that are live at once, by dispatch. Dense
# layers have as many as einsum.
WORKING = {"einsum": 12, "ragged": 8.5}
SCORES = 1.75  # copies of XLA's causal scores that are live at once (docs/on-gpus.md)


def chosen(
    model: ModelConfig,
    compute: ComputeConfig,
    train: TrainConfig,
    mesh: Mesh,
    sequence_length: int,
    state_bytes: int,
    trained_bytes: int,
) -> tuple[str, int]:
    """Return (remat, accumulate). Values that the config sets are kept; open ones are chosen.

    The choice is the fastest policy, then the fewest micro-batches, that are estimated to leave the
    fraction FREE of a chip's memory unused. Two sequences per device take precedence over a faster
    policy. Where the chip's memory is unknown, as on CPUs, the choice is `full` and one sequence
    per device.

    state_bytes: parameters and moments on one device. trained_bytes: trained parameters on one
    device.
    """
    tensor = mesh.shape["tensor"]
    shards = mesh.size // tensor // mesh.shape["context"]
    counts = [train.accumulate]
    if not train.accumulate:
        rows = train.batch_size // shards  # per device and step
        counts = [count for count in range(rows, 0, -1) if rows % count == 0]
    device_kind = mesh.devices.flat[0].device_kind
    memory = _memory(device_kind)
    if not memory:
        return "full" if compute.remat == "auto" else compute.remat, counts[0]
    size = jnp.dtype(compute.dtype).itemsize
    gradients = 2 * trained_bytes  # those of one micro-batch, and the running sums
    copies = trained_bytes * size / 4
    head = 2 * model.vocab_size * model.d_model * (size + 4) / tensor  # gathered, with its gradient
    room = (1 - FREE) * memory - state_bytes - gradients - copies - head

    dispatch = compute.dispatch if any(spec.experts for *_, spec in model.runs()) else "einsum"

    def fits(policy: str, count: int) -> bool:
        tokens = train.batch_size // count * sequence_length * tensor / mesh.size
        widths = [
            (length, _kept(model, spec, compute, policy, tensor), _hidden(spec, compute) / tensor)
            for _, length, spec in model.runs()
        ]
        kept = sum(length * kept for length, kept, _ in widths)
        working = WORKING[dispatch] * (model.d_model + max(hidden for *_, hidden in widths))
        working += _scores(model, compute, mesh, sequence_length) / tensor
        return tokens * size * (kept + working) <= room

    remat = compute.remat
    if remat == "auto":
        usual = [policy for policy in POLICIES if policy not in SLOWER.get(device_kind, ())]
        pairs = ((policy, count) for count in counts[1::-1] for policy in usual)
        remat = next((policy for policy, count in pairs if fits(policy, count)), "full")
    fewer = (count for count in reversed(counts) if remat in POLICIES and fits(remat, count))
    return remat, next(fewer, counts[0])


def _scores(model: ModelConfig, compute: ComputeConfig, mesh: Mesh, length: int) -> float:
    """Values per token that the attention of one layer holds in pairs of tokens: nothing in splash
    attention, its mask in cuDNN's, and scores and weights of each head in XLA's."""
    if compute.kernels == "pallas":
        return 0.0
    is_whole, dtype = mesh.shape["context"] == 1, jnp.dtype(compute.dtype)
    is_cudnn = cudnn.is_possible(length, model.head_dim, model.attention_cap, dtype)
    if compute.kernels == "cuda" and is_whole and is_cudnn:
        return length
    return SCORES * model.heads * length


def _memory(device_kind: str) -> float:
    """Bytes that a program may use on a device of this kind; 0 if that is unknown. A GPU's are what
    XLA has reserved there (XLA_PYTHON_CLIENT_MEM_FRACTION), which only a GPU itself can tell."""
    known = chip(device_kind)
    if known and known.memory:
        return known.memory
    local = jax.local_devices()[0]
    told = (local.device_kind == device_kind and local.memory_stats()) or {}
    # In whole GiB: on equal machines, which must run the same program, it differs by a few bytes.
    return GIB * (told.get("bytes_limit", 0) // GIB)


def _hidden(spec: LayerSpec, compute: ComputeConfig) -> float:
    """Hidden width of the feed-forwards per token, counting one copy per slot of its experts."""
    spread = compute.capacity_factor if compute.dispatch == "einsum" else 2.0
    copies = spec.k * spread if spec.experts else 1.0
    return copies * spec.d_ff + spec.shared_d_ff + spec.anchor * spec.d_ff


def _kept(
    model: ModelConfig, spec: LayerSpec, compute: ComputeConfig, policy: str, tensor: int
) -> float:
    """Values per token that one layer keeps on one device for the backward pass: its input, plus
    whatever the policy keeps."""
    kept = float(model.d_model)
    if policy != "full":
        heads = 2 * model.heads + 2 * model.kv_heads  # queries, output, keys, values
        kept += model.d_model + heads * model.head_dim / tensor
    if policy == "ffn":
        kept += 2 * _hidden(spec, compute) / tensor
    return kept
