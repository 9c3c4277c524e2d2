"""Router rows from random numbers or from what prompts look like inside the base model. Pure numpy.

A gate is [E, D] per layer, one row per expert: the router's kernel transposed. The modes that share
a name with mergekit-moe (0.1.5) compute what it computes.
"""

import math
from collections.abc import Sequence

import numpy as np


def normalised(vector: np.ndarray) -> np.ndarray:
    """v / max(|v|, 1e-8) along the last axis."""
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-8)


def random_gates(mode: str, layers: int, experts: int, d_model: int, seed: int) -> np.ndarray:
    """[L, E, D]. normal: std 0.02. random: std 1. uniform_random: within 1 / sqrt(D), as
    torch.nn.Linear starts."""
    rng = np.random.default_rng(seed)
    shape = (layers, experts, d_model)
    if mode == "uniform_random":
        bound = math.sqrt(1 / d_model)
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(
        {"normal": 0.02, "random": 1.0}[mode]
    )


def pool(states_PTD: Sequence[np.ndarray], mode: str, pooling: str = "mean") -> np.ndarray:
    """The states of one expert's prompts, each [tokens, D] without padding -> [D].

    hidden: last token, mean over prompts. hidden_avg: mean over tokens, mean over prompts.
    cheap_embed: sum over all tokens of all prompts, normalised. router_input: mean over tokens or
    the last one, each prompt normalised, then their mean.
    """
    if mode == "cheap_embed":
        return normalised(sum(states.sum(0) for states in states_PTD))
    if mode == "hidden":
        return np.mean([states[-1] for states in states_PTD], axis=0)
    if mode == "hidden_avg":
        return np.mean([states.mean(0) for states in states_PTD], axis=0)
    return np.mean(
        [normalised(states.mean(0) if pooling == "mean" else states[-1]) for states in states_PTD],
        axis=0,
    )


def gate_row(positive: np.ndarray, negative: np.ndarray | None) -> np.ndarray:
    """norm(positive - negative), or norm(positive) when there are no negative prompts."""
    return normalised(positive if negative is None else positive - negative).astype(np.float32)


def condition_number(gate_ED: np.ndarray) -> float:
    """Largest over smallest singular value: large when experts' rows are nearly equal, so that
    routing cannot tell them apart."""
    return float(np.linalg.cond(gate_ED))
