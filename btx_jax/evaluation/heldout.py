"""Held-out loss per domain: nats per token and bits per byte, dropless, with the experts' loads."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btx_jax.config import ComputeConfig, ModelConfig
from btx_jax.models.llama import Llama, Params, abstract_params, head_kernel
from btx_jax.parallel.hosts import put
from btx_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from btx_jax.training.losses import next_token_targets, token_nll


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """nats_per_token: over every target, ends of documents included. bits_per_byte: over the text alone, per UTF-8 byte.

    load: [[share of routed claims per expert] per MoE layer], empty for a dense model.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    load: list[list[float]]


@functools.lru_cache(maxsize=16)
def make_heldout_step(
    model: ModelConfig, compute: ComputeConfig, mesh: Mesh, batch_size: int, sequence_length: int, eos: int | None
) -> Any:
    """(params, {tokens, segments}) -> sums over the batch, compiled under the mesh. Routing drops nothing, whatever training did."""
    llama = Llama(model, dataclasses.replace(compute, dispatch="ragged", remat="none"))

    def heldout_step(params: Params, tokens: jax.Array, segments: jax.Array):
        inputs, input_segments, targets, mask = next_token_targets(tokens, segments)
        hidden, routing = llama.apply({"params": params}, inputs, input_segments)
        nll = token_nll(hidden, head_kernel(params), targets, compute.loss_chunk)
        text = mask & (targets != (-1 if eos is None else eos))
        routed = (input_segments > 0).sum()
        return {
            "nll": (nll * mask).sum(),
            "tokens": mask.sum(),
            "text_nll": (nll * text).sum(),
            "routed": routed,
            "load": [stats.load_E * routed for stats in routing.values()],
        }

    boxed = abstract_params(model)
    shardings = param_shardings(boxed, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda x: hasattr(x, "names")),
        shardings,
    )
    rows = jax.ShapeDtypeStruct((batch_size, sequence_length + 1), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(heldout_step, out_shardings=replicated(mesh)).lower(shapes, rows, rows).compile()


def heldout_loss(step: Any, params: Params, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> HeldoutLoss | None:
    """Over all batches {tokens, segments, bytes}; None when there is no target among them."""
    totals: dict[str, float] = {"nll": 0.0, "tokens": 0, "text_nll": 0.0, "routed": 0, "bytes": 0}
    load: list[np.ndarray] = []
    for batch in batches:
        rows = [put(batch[name], batch_sharding(mesh)) for name in ("tokens", "segments")]
        sums = jax.device_get(step(params, *rows))
        for name in ("nll", "tokens", "text_nll", "routed"):
            totals[name] += float(sums[name])
        totals["bytes"] += int(batch["bytes"].sum())
        load = [a + b for a, b in zip(load, sums["load"], strict=True)] if load else sums["load"]
    if not totals["tokens"]:
        return None
    shares = [(layer / totals["routed"]).tolist() for run in load for layer in run]
    bits = totals["text_nll"] / math.log(2) / totals["bytes"]
    return HeldoutLoss(totals["nll"] / totals["tokens"], bits, int(totals["tokens"]), int(totals["bytes"]), shares)
