"""Router rows from random numbers, or from the base model's hidden states of prompts. Pure numpy.

A gate is [E, D] per layer, one row per expert: the transpose of the router's kernel. Modes that
share a name with mergekit-moe (0.1.5) compute the same values.
"""

import math
from collections.abc import Sequence

import numpy as np


def normalised(vector: np.ndarray) -> np.ndarray:
    """v / max(|v|, 1e-8) along the last axis."""
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-8)


def random_gates(mode: str, layers: int, experts: int, d_model: int, seed: int) -> np.ndarray:
    """Random gates [L, E, D]. normal: std 0.02. random: std 1. uniform_random: uniform within 1 /
    sqrt(D), the initialisation of torch.nn.Linear."""
    rng = np.random.default_rng(seed)
    shape = (layers, experts, d_model)
    if mode == "uniform_random":
        bound = math.sqrt(1 / d_model)
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(
        {"normal": 0.02, "random": 1.0}[mode]
    )


def pool(states_PTD: Sequence[np.ndarray], mode: str, pooling: str = "mean") -> np.ndarray:
    """Pool the states of one expert's prompts, each [tokens, D] without padding, into [D].

    hidden: last token, mean over prompts. hidden_avg: mean over tokens, mean over prompts.
    cheap_embed: sum over all tokens of all prompts, normalised. router_input: mean over tokens or
    the last token, each prompt normalised, then their mean.
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
    """Largest over smallest singular value: large when experts' rows are so similar that routing
    can hardly distinguish them."""
    return float(np.linalg.cond(gate_ED))
