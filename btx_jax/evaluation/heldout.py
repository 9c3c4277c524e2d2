"""Held-out loss: nats per token and bits per byte, without dropping tokens, and routing statistics.
Shape legend: models/layers.py."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.evaluation.lora import GateSums
from btx_jax.evaluation.routing import RoutingSums, routing_sums
from btx_jax.models.layers import Readout, on_mesh, platform_kernels
from btx_jax.models.llama import Llama, Params, head_kernel
from btx_jax.models.routing import feed_forward_routing, lora_routing
from btx_jax.parallel.compiler_options import compiler_options
from btx_jax.parallel.hosts import is_first, put
from btx_jax.parallel.sharding import batch_sharding, replicated
from btx_jax.progress import bar
from btx_jax.training.losses import next_token_targets, token_nll

Rows = Mapping[str, np.ndarray]  # tokens, segments: [rows, T + 1] int32; bytes: [rows]


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Loss on held-out text. nats_per_token: over all targets, including ends of documents.
    bits_per_byte: over the text only, per UTF-8 byte."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


@functools.lru_cache(maxsize=16)
def make_heldout_step(model: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> Any:
    """(params, tokens, segments) -> (nll [B, T], [RoutingSums per MoE run], {LoRA router:
    GateSums}), jitted for the mesh. No token is dropped, whatever the training config."""
    jitted = _heldout_step(model, compute, mesh)

    def under_mesh(params: Params, tokens: jax.Array, segments: jax.Array) -> Any:
        with on_mesh(mesh, compute.dtype):
            return jitted(params, tokens, segments)

    return under_mesh


def lower_heldout_step(
    model: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    params: Params,
    batch_size: int,
    sequence_length: int,
):
    """Lower the held-out step for abstract parameters, on the mesh's devices, which need not
    exist."""
    rows = jax.ShapeDtypeStruct(
        (batch_size, sequence_length + 1), np.int32, sharding=batch_sharding(mesh)
    )
    with on_mesh(mesh, compute.dtype):
        return _heldout_step(model, compute, mesh).lower(params, rows, rows)


def _heldout_step(model: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> Any:
    kernels = platform_kernels(compute.kernels, mesh.devices.flat[0].platform)
    llama = Llama(
        model,
        dataclasses.replace(
            compute, dispatch="ragged", remat="none", kernels=kernels, quantize="none"
        ),
        keep_choices=True,
    )

    def heldout_step(params: Params, tokens: jax.Array, segments: jax.Array):
        inputs, input_segments, targets, _ = next_token_targets(tokens, segments)
        hidden, routing = llama.apply({"params": params}, inputs, input_segments)
        head, readout = head_kernel(params), Readout.of(model)
        nll = token_nll(hidden, head, targets, compute.loss_chunk, readout)
        count = (input_segments > 0).sum()
        chosen = {name: GateSums.of(stats, count) for name, stats in lora_routing(routing).items()}
        return (
            nll,
            [routing_sums(stats, count) for stats in feed_forward_routing(routing).values()],
            chosen,
        )

    return jax.jit(
        heldout_step,
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh.devices.flat[0], compute.compiler_options),
    )


def token_losses(
    step: Any,
    params: Params,
    rows: Rows,
    batch_size: int,
    mesh: Mesh,
    check: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, RoutingSums | None, dict[str, GateSums]]:
    """(-log p of every next token [rows, T], nats; routing sums of all tokens by layer, or None
    without experts; sums for each router of LoRA experts).

    Where the target mask is false (`next_token_targets`), the value is meaningless. check: called
    before every batch; whatever it raises ends the evaluation.
    """
    count = len(rows["tokens"])
    losses, total = [], None
    gates: dict[str, GateSums] = {}
    starts = range(0, count, batch_size)
    for start in bar(starts, desc="held-out", unit="batch", leave=False, shown=is_first()):
        check()
        batch = [rows[name][start : start + batch_size] for name in ("tokens", "segments")]
        batch = [np.pad(x, ((0, batch_size - len(x)), (0, 0))) for x in batch]
        nll, runs, chosen = jax.device_get(
            step(params, *(put(x, batch_sharding(mesh)) for x in batch))
        )
        losses.append(nll)
        if runs:
            sums = RoutingSums.joined(runs)
            total = sums if total is None else total + sums
        gates = {
            name: gates[name] + sums if name in gates else sums for name, sums in chosen.items()
        }
    length = rows["tokens"].shape[1] - 1
    return np.concatenate([np.zeros((0, length), np.float32), *losses])[:count], total, gates


def mean_loss(nll: np.ndarray, rows: Rows, eos: int | None) -> HeldoutLoss | None:
    """The mean of `token_losses`; None when the rows have no target."""
    _, _, targets, mask = next_token_targets(rows["tokens"], rows["segments"])
    if not mask.any():
        return None
    text = mask & (targets != (-1 if eos is None else eos))
    nll, size = nll.astype(np.float64), int(rows["bytes"].sum())
    bits = float(nll[text].sum()) / math.log(2) / size
    return HeldoutLoss(float(nll[mask].mean()), bits, int(mask.sum()), size)
