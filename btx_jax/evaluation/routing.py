"""Routing statistics by layer, and similarity of the experts' weights. Shape legend:
models/layers.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btx_jax.models.routing import RoutingStats
from btx_jax.parallel.sharding import replicated

DEAD = 0.01  # an expert that gets less than this share of a layer's choices is dead


class RoutingSums(NamedTuple):
    """Sums over tokens, by layer. load: claims per expert. gate_load: their weights. pairs [first,
    second choice]: number of tokens. entropy: nats. Experts that a layer lacks count 0."""

    load_LE: Any
    gate_load_LE: Any
    pairs_LEE: Any
    entropy_L: Any
    tokens_L: Any

    @classmethod
    def joined(cls, runs: Sequence["RoutingSums"]) -> "RoutingSums":
        """Concatenate the layers of all runs, padded to the largest number of experts."""
        experts = max(run.load_LE.shape[1] for run in runs)

        def padded(name: str, x: np.ndarray) -> np.ndarray:
            wide = [(0, experts - size) for size in x.shape[1:]]
            return np.pad(np.asarray(x, np.float64), [(0, 0), *wide])

        return cls(
            *(
                np.concatenate([padded(name, getattr(run, name)) for run in runs])
                for name in cls._fields
            )
        )

    def __add__(self, other: Any) -> "RoutingSums":
        return RoutingSums(*(a + b for a, b in zip(self, other, strict=True)))


def routing_sums(stats: RoutingStats, tokens: jax.Array) -> RoutingSums:
    """Sums of one run over `tokens` valid tokens. stats: of the run, including choices."""
    assert stats.choice is not None
    index_LNK = stats.choice.index_GSK.reshape(
        stats.load_E.shape[0], -1, stats.choice.index_GSK.shape[-1]
    )
    layers, experts = stats.load_E.shape
    chosen = jax.nn.one_hot(index_LNK, experts)
    pairs = (
        jnp.einsum("lne,lnf->lef", chosen[:, :, 0], chosen[:, :, 1])
        if chosen.shape[2] > 1
        else jnp.zeros((layers, experts, experts))
    )
    return RoutingSums(
        load_LE=stats.load_E * tokens,
        gate_load_LE=stats.gate_load_E * tokens,
        pairs_LEE=pairs,
        entropy_L=stats.entropy * tokens,
        tokens_L=jnp.full(layers, tokens, jnp.float32),
    )


def summarise(sums: RoutingSums) -> dict[str, Any]:
    """Summary of one domain: {load, gate_load [L][E]: shares; pairs [L][E][E]: shares of tokens;
    entropy [L]: nats; dead [L]: expert numbers}."""
    tokens = sums.tokens_L[:, None]
    load = sums.load_LE / sums.load_LE.sum(1, keepdims=True)
    return {
        "load": load.tolist(),
        "gate_load": (sums.gate_load_LE / tokens).tolist(),
        "pairs": (sums.pairs_LEE / tokens[..., None]).tolist(),
        "entropy": (sums.entropy_L / sums.tokens_L).tolist(),
        "dead": [np.flatnonzero(layer < DEAD).tolist() for layer in load],
    }


def mutual_information(load: Mapping[str, Sequence[Sequence[float]]]) -> list[float]:
    """I(expert; domain) of each layer in nats, with equally likely domains. load: domain -> [L][E],
    rows summing to 1.

    0 when all domains use the experts alike; log(domains) when each has its own experts.
    """
    p_DLE = np.array(list(load.values()), np.float64)
    mean_LE = p_DLE.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p_DLE > 0, p_DLE * np.log(p_DLE / mean_LE), 0)
    return terms.sum(-1).mean(0).tolist()


def redundancy(params: Mapping[str, Any], mesh: Mesh) -> list[dict[str, Any]]:
    """For each MoE layer: {cosine, deviation_cosine [E][E], norm_ratio [E]} of its experts'
    weights, with gate, up and down as one vector; the anchor is last. Experts of one seed are
    nearly parallel, so `deviation_cosine` compares their deviations from the mean. norm_ratio:
    relative to the mean norm."""
    runs = sorted(
        (name for name in params if name.startswith("layers_")),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    layers = []
    for run in runs:
        ffn = params[run]["ffn"]
        if "router" not in ffn:
            continue
        anchor = params[run].get("anchor")
        with jax.set_mesh(mesh):
            grams = [
                jax.jit(_grams, out_shardings=replicated(mesh))(ffn[name], anchor and anchor[name])
                for name in ("gate", "up", "down")
            ]
        whole, apart = (
            np.sum([np.asarray(gram, np.float64) for gram in parts], axis=0)
            for parts in zip(*grams, strict=True)
        )
        for gram, deviation in zip(whole, apart, strict=True):
            norms = np.sqrt(np.diagonal(gram))
            layers.append(
                {
                    "cosine": _cosine(gram),
                    "deviation_cosine": _cosine(deviation),
                    "norm_ratio": (norms / norms.mean()).tolist(),
                }
            )
    return layers


def _grams(w: jax.Array, anchor: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Weights [L, E, ...] and optionally an anchor [L, ...] -> inner products [L, E, E] of all, and
    of their deviations from the mean."""
    if anchor is not None:
        w = jnp.concatenate([w, anchor[:, None]], axis=1)
    flat_LEX = w.reshape(*w.shape[:2], -1).astype(jnp.float32)
    apart_LEX = flat_LEX - flat_LEX.mean(1, keepdims=True)
    product = lambda x: jnp.einsum("lex,lfx->lef", x, x, precision="highest")  # noqa: E731
    return product(flat_LEX), product(apart_LEX)


def _cosine(gram: np.ndarray) -> list[list[float]]:
    """Cosines [E][E]; zero where a norm is zero, as those of the deviations of equal experts
    are."""
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
    outer = norms[:, None] * norms[None, :]
    return np.divide(gram, outer, out=np.zeros_like(gram), where=outer > 1e-12).tolist()
