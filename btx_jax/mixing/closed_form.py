"""Solve a mixture's routers and shared parameters in closed form, layer by layer, while the
experts' texts pass through it: sums over tokens are accumulated, weights are computed from the
sums, and held-out tokens measure how well the routers route."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from btx_jax.architectures.tensors import EMBEDDING, TensorId, slots
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.ridge import RidgeConfig
from btx_jax.errors import UserError
from btx_jax.mixing.logistic import logistic_rows
from btx_jax.mixing.ridge import Moments, moments, own_share, solve
from btx_jax.mixing.states import Read, forced_states
from btx_jax.mixing.text import Rows
from btx_jax.progress import bar


class Routers(NamedTuple):
    """Solved routers. rows: [layers, experts, D], float32, zeros for dense layers. own: [layers,
    texts], the share of each text's held-out tokens that choose its expert first; NaN for dense
    layers."""

    rows: np.ndarray
    own: np.ndarray


def mixture_layers(model: ModelConfig) -> list[int]:
    return [layer for layer, spec in enumerate(model.layer_specs()) if spec.experts]


# (layer, for each text the router's inputs in batches of tokens [., D]) -> router rows [experts, D]
Fit = Callable[[int, Sequence[Iterable[np.ndarray]]], np.ndarray]


def by_ridge(
    ridge: RidgeConfig,
    keep: Callable[[int, Moments], None],
    before: Callable[[int], Moments] | None = None,
) -> Fit:
    """Fit router rows by ridge regression.

    keep: receives the sums of each mixture layer, in order. before: returns a layer's sums for
    experts that have no text here; these experts come first.
    """

    def fit(layer: int, states: Sequence[Iterable[np.ndarray]]) -> np.ndarray:
        whole = joined([*([before(layer)] if before else []), *map(moments, states)])
        keep(layer, whole)
        return solved(layer, whole, ridge)

    return fit


def by_logistic(layer: int, states: Sequence[Iterable[np.ndarray]]) -> np.ndarray:
    return logistic_rows([np.concatenate([*parts]) for parts in states])


def _used(states: Iterable[np.ndarray], text: Rows) -> Iterable[np.ndarray]:
    """Yield the states of each row's tokens that are used for fitting. states: one [length, D] per
    row."""
    return (row[use] for row, use in zip(states, text.is_used, strict=True))


def solve_routers(
    model: ModelConfig,
    read: Read,
    texts: Sequence[tuple[int | None, Rows]],
    fit: Fit,
    merging: "Merging | None" = None,
) -> Routers:
    """Solve the routers of a mixture, layer by layer.

    read: returns a tensor of the mixture; never called for routers. texts: (expert, its text).
    Texts without a routed expert are used only by `merging`, which solves the shared parameters in
    the same pass. Raises UserError, naming the layer, if rows cannot be solved.
    """
    experts = max(spec.experts for spec in model.layer_specs())
    rows = np.zeros((model.layers, experts, model.d_model), np.float32)
    routed = [(n, expert, text) for n, (expert, text) in enumerate(texts) if expert is not None]
    own = np.full((model.layers, len(routed)), np.nan)
    mixtures = mixture_layers(model)
    for layer, seen in enumerate(_passed(model, read, texts, merging)):
        if layer not in mixtures:
            continue
        rows[layer] = fit(layer, [_used(seen[n], text) for n, _, text in routed])
        for column, (n, expert, text) in enumerate(routed):
            own[layer, column] = own_share([seen[n][text.is_heldout_RT]], rows[layer], expert)
    return Routers(rows, own)


def _passed(
    model: ModelConfig,
    read: Read,
    texts: Sequence[tuple[int | None, Rows]],
    merging: "Merging | None",
) -> Iterator[list[np.ndarray]]:
    states = forced_states(model, read, texts, merging)
    return iter(bar(states, total=model.layers, desc="reading text", unit="layer"))


def solve_shared(
    model: ModelConfig, read: Read, texts: Sequence[tuple[int | None, Rows]], merging: "Merging"
) -> None:
    """Solve only the parameters that `merging` solves, without routers. Arguments as for
    `solve_routers`."""
    for _ in _passed(model, read, texts, merging):
        pass


class Merging:
    """Solves the parameters that experts share: the embedding immediately, all others just before
    `forced_states` reads them.

    make: (tensor, for each model the sums that its merge is solved from) -> the merged tensor.
    texts: (index of the model, its text), in the order in which they are processed. counts: how
    often each text contains each token, [vocab_size]. Every model has the same weight, however much
    text it has. file: seekable storage for the solved tensors. solved: the solved tensors.
    """

    def __init__(
        self,
        make: Callable[[TensorId, Sequence[np.ndarray]], np.ndarray],
        texts: Sequence[tuple[int, Rows]],
        counts: Sequence[np.ndarray],
        file: BinaryIO,
    ):
        self._make, self._texts, self.solved = make, texts, _Kept(file)
        self._solve([EMBEDDING], [count / count.sum() for count in counts])

    def __call__(self, tensors: Sequence[TensorId], states: Sequence[np.ndarray]) -> None:
        grams = []
        for (_, text), rows in zip(self._texts, states, strict=True):
            gram_EDD, _, count_E = moments(_used(rows, text))
            grams.append(gram_EDD[0] / count_E[0])
        self._solve(tensors, grams)

    def _solve(self, tensors: Sequence[TensorId], of_texts: Sequence[np.ndarray]) -> None:
        of_models: dict[int, list[np.ndarray]] = {}
        for (model, _), part in zip(self._texts, of_texts, strict=True):
            of_models.setdefault(model, []).append(part)
        seen = [sum(parts[1:], parts[0]) / len(parts) for _, parts in sorted(of_models.items())]
        for tensor in tensors:
            try:
                self.solved.keep(tensor, self._make(tensor, seen))
            except UserError as error:
                raise UserError(f"{tensor}: {error}") from None


class _Kept(Mapping[TensorId, np.ndarray]):
    """Arrays in a file, safe to read from several threads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[TensorId, tuple[int, np.dtype, tuple[int, ...]]] = {}

    def keep(self, tensor: TensorId, array: np.ndarray) -> None:
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._file.flush()
        self._places[tensor] = start, array.dtype, array.shape

    def __getitem__(self, tensor: TensorId) -> np.ndarray:
        start, dtype, shape = self._places[tensor]
        return np.array(np.memmap(self._file, dtype, "r", start, shape))

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._places

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def joined(parts: Sequence[Moments]) -> Moments:
    """Concatenate the domains of all parts, in order."""
    return Moments(*map(np.concatenate, zip(*parts, strict=True)))


def solved(layer: int, whole: Moments, ridge: RidgeConfig) -> np.ndarray:
    """Like `solve`, but errors name the layer."""
    try:
        return solve(whole, ridge)
    except UserError as error:
        raise UserError(f"the router of layer {layer}: {error}") from None


def seen_tensors(model: ModelConfig) -> Iterator[TensorId]:
    """Tensors outside the experts that routers' inputs depend on."""
    for tensor in slots(model):
        if _is_before_routers(tensor) and tensor.expert is None and not tensor.is_router:
            yield tensor


def _is_before_routers(tensor: TensorId) -> bool:
    return tensor.layer is not None or tensor == EMBEDDING


class Hashed:
    """Reads through `read` and records the sha256 of every tensor's values as float32."""

    def __init__(self, read: Read):
        self._read = read
        self._hashes: dict[TensorId, str] = {}

    def __call__(self, tensor: TensorId) -> np.ndarray:
        array = self._read(tensor)
        values = np.ascontiguousarray(array, "<f4")
        self._hashes[tensor] = hashlib.sha256(values.data).hexdigest()
        return array

    def of_expert(self, expert: int | None) -> dict[TensorId, str]:
        """Hashes of those of an expert's tensors that were read and that a router's input depends
        on, under their names in a dense model, so that the expert's index does not matter. None:
        hashes of such tensors that belong to no expert."""
        return {
            tensor if expert is None else tensor.of_dense(): sha256
            for tensor, sha256 in self._hashes.items()
            if tensor.expert == expert and _is_before_routers(tensor)
        }
