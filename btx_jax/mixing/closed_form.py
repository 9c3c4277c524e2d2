"""Routers of a mixture, solved layer by layer while its experts' texts pass through it: sums are
gathered, rows follow from them, and the held-out tokens tell how well they route."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from btx_jax.architectures.tensors import EMBEDDING, TensorId, slots
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.ridge import RidgeConfig
from btx_jax.errors import UserError
from btx_jax.mixing.ridge import Moments, moments, own_share, solve
from btx_jax.mixing.states import Read, forced_states
from btx_jax.mixing.text import Rows
from btx_jax.progress import bar


class Routers(NamedTuple):
    """rows: [layers, experts, D], float32, zeros for dense layers. own: [layers, texts], the share
    of held-out tokens of each text that choose its expert first; NaN for dense layers."""

    rows: np.ndarray
    own: np.ndarray


def mixture_layers(model: ModelConfig) -> list[int]:
    return [layer for layer, spec in enumerate(model.layer_specs()) if spec.experts]


def solve_routers(
    model: ModelConfig,
    read: Read,
    texts: Sequence[tuple[int, Rows]],
    ridge: RidgeConfig,
    keep: Callable[[int, Moments], None],
    before: Callable[[int], Moments] | None = None,
) -> Routers:
    """read: a tensor of the mixture; routers are not asked for. texts: (expert, its text). keep: is
    given the sums of each mixture layer, in order. before: those of a layer's experts that have no
    text here, which come first. Raises UserError, naming the layer, where rows cannot be solved."""
    experts = max(spec.experts for spec in model.layer_specs())
    rows = np.zeros((model.layers, experts, model.d_model), np.float32)
    own = np.full((model.layers, len(texts)), np.nan)
    mixtures = mixture_layers(model)
    states = bar(
        forced_states(model, read, texts), total=model.layers, desc="routers", unit="layer"
    )
    for layer, seen in enumerate(states):
        if layer not in mixtures:
            continue
        parts = [] if before is None else [before(layer)]
        for (_, text), state in zip(texts, seen, strict=True):
            is_solved_from = (text.segments_RT > 0) & ~text.is_heldout_RT
            parts.append(moments(row[use] for row, use in zip(state, is_solved_from, strict=True)))
        whole = joined(parts)
        keep(layer, whole)
        rows[layer] = solved(layer, whole, ridge)
        for number, ((expert, text), state) in enumerate(zip(texts, seen, strict=True)):
            own[layer, number] = own_share([state[text.is_heldout_RT]], rows[layer], expert)
    return Routers(rows, own)


def joined(parts: Sequence[Moments]) -> Moments:
    """The domains of all parts, in order."""
    return Moments(*map(np.concatenate, zip(*parts, strict=True)))


def solved(layer: int, whole: Moments, ridge: RidgeConfig) -> np.ndarray:
    """`solve`, with the layer in its errors."""
    try:
        return solve(whole, ridge)
    except UserError as error:
        raise UserError(f"the router of layer {layer}: {error}") from None


def seen_tensors(model: ModelConfig) -> Iterator[TensorId]:
    """Those of no single expert that what routers see depends on, besides the experts."""
    for tensor in slots(model):
        inside = tensor.layer is not None or tensor == EMBEDDING
        if inside and tensor.expert is None and not tensor.is_router:
            yield tensor


class Hashed:
    """Reads through `read`, and remembers the sha256 of every tensor's values as float32."""

    def __init__(self, read: Read):
        self._read = read
        self._hashes: dict[TensorId, str] = {}

    def __call__(self, tensor: TensorId) -> np.ndarray:
        array = self._read(tensor)
        values = np.ascontiguousarray(array, "<f4")
        self._hashes[tensor] = hashlib.sha256(values.data).hexdigest()
        return array

    def of_expert(self, expert: int | None) -> dict[TensorId, str]:
        """Of what was read of an expert, whatever its number, as of a dense model; None: of what is
        no expert's."""
        return {
            tensor if expert is None else tensor.of_dense(): sha256
            for tensor, sha256 in self._hashes.items()
            if tensor.expert == expert
        }
