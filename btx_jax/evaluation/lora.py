"""Analysis of LoRA experts: similarity of those in a layer, and the choices of their routers. Shape
legend: models/lora.py."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from btx_jax.checkpoints.adapter import to_tensors
from btx_jax.config.model_config import ModelConfig
from btx_jax.models.routing import RoutingStats


class GateSums(NamedTuple):
    """Sums over tokens for one router, by layer of its run. chosen: share of each token's choices.
    gate: their weights."""

    chosen_LE: Any
    gate_LE: Any
    tokens: Any

    @classmethod
    def of(cls, stats: RoutingStats, tokens: jax.Array) -> "GateSums":
        return cls(stats.load_E * tokens, stats.gate_load_E * tokens, tokens)

    def __add__(self, other: Any) -> "GateSums":
        return GateSums(*(a + b for a, b in zip(self, other, strict=True)))


def by_target(model: ModelConfig, sums: Mapping[str, GateSums]) -> dict[str, Any]:
    """{target: for each layer {load, gate: share and mean weight of each expert}, or None without a
    router}."""
    result: dict[str, Any] = {}
    for target in model.lora.targets if model.lora else ():
        layers: list[Any] = []
        for run, length, _ in model.runs():
            found = sums.get(f"{run}/{target}")
            if found is None:
                layers += [None] * length
                continue
            load, gate = (
                np.asarray(x, np.float64) / float(found.tokens)
                for x in (found.chosen_LE, found.gate_LE)
            )
            layers += [{"load": load[i].tolist(), "gate": gate[i].tolist()} for i in range(length)]
        result[target] = layers
    return result


def redundancy(
    model: ModelConfig, params: Mapping[str, Any]
) -> dict[str, list[dict[str, float] | None]]:
    """{target: for each layer {distance, cosine, norm_ratio}, or None with fewer than two experts}:
    means over pairs of a layer's experts.

    distance: Frobenius norm of (alpha / rank) (B_i A_i - B_j A_j), which also grows with the amount
    learnt (compared in MoLA section 5). cosine (of the products as vectors) and norm_ratio (shorter
    to longer) do not.
    """
    tensors = to_tensors(model, params)
    specs = [spec.lora for spec in model.layer_specs()]
    result: dict[str, list[dict[str, float] | None]] = {}
    for target in model.lora.targets if model.lora else ():
        result[target] = []
        for layer, spec in enumerate(specs):
            if spec is None or spec.experts < 2:
                result[target].append(None)
                continue
            a_ERI, b_EOR = (
                tensors[f"layers.{layer}.{target}.{part}"].astype(np.float64) for part in "ab"
            )
            result[target].append(pairs(spec.scale**2 * gram(a_ERI, b_EOR)))
    return result


def gram(a_ERI: np.ndarray, b_EOR: np.ndarray) -> np.ndarray:
    """Inner products <B_i A_i, B_j A_j> [E, E] = sum of (B_i^T B_j) * (A_i A_j^T), without
    computing the products themselves."""
    return np.einsum("eor,fos,eri,fsi->ef", b_EOR, b_EOR, a_ERI, a_ERI, optimize=True)


def pairs(gram_EE: np.ndarray) -> dict[str, float]:
    """Means over pairs of experts. An expert that is still zero has cosine 0 and norm ratio 0 with
    any other."""
    norms = np.sqrt(np.maximum(np.diagonal(gram_EE), 0))
    distances, cosines, ratios = [], [], []
    for i, j in itertools.combinations(range(len(norms)), 2):
        distances.append(np.sqrt(max(gram_EE[i, i] + gram_EE[j, j] - 2 * gram_EE[i, j], 0)))
        cosines.append(gram_EE[i, j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0)
        ratios.append(
            min(norms[i], norms[j]) / max(norms[i], norms[j]) if max(norms[i], norms[j]) else 0.0
        )
    return {
        "distance": float(np.mean(distances)),
        "cosine": float(np.mean(cosines)),
        "norm_ratio": float(np.mean(ratios)),
    }
