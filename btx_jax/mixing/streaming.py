"""Make a mixture tensor by tensor from readers of its sources. Memory holds no more than the
sources of one tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from btx_jax.architectures.tensors import EMBEDDING, HEAD, Reader, TensorId, slots
from btx_jax.architectures.values import cast
from btx_jax.config.merges import MERGE_SETTINGS
from btx_jax.config.mix_methods import Piece, cut
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.mixing.averaging import Shared, generator
from btx_jax.mixing.merge import wide
from btx_jax.mixing.recipe import ExpertSource, Recipe

VOCABULARY = (EMBEDDING, HEAD)  # tensors with a row for each token
SHARED_GATE = "shared_expert/router"


@dataclass(frozen=True)
class Mixture:
    """A mixture to be made, tensor by tensor.

    model: of the result. readers: of the distinct sources, base_model's first. source_of: index of
    the reader for each of recipe.sources. dtype: of every tensor. gates: [layers, rows, D], one row
    per routed expert, then one for the shared expert's gate if the model has one. solved: shared
    tensors that have already been solved from text.
    """

    recipe: Recipe
    model: ModelConfig
    readers: Sequence[Reader]
    source_of: Sequence[int]
    dtype: np.dtype
    gates: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    solved: Mapping[TensorId, np.ndarray] = field(default_factory=dict)

    @property
    def base(self) -> Reader:
        return self.readers[0]

    def averaged(self) -> list[int]:
        """Indices of the readers that provide the tensors outside the experts: the base, or each
        distinct model of the experts."""
        return [0] if self.recipe.base == "copy" else list(dict.fromkeys(self.source_of))

    @property
    def shared(self) -> Shared:
        """The merge of the tensors that belong to no expert."""
        recipe, readers = self.recipe, [self.readers[number] for number in self.averaged()]
        settings = {key: getattr(recipe, key) for key in MERGE_SETTINGS[recipe.merge]}
        return Shared(recipe.merge, settings, self.base, readers, self.dtype, recipe.seed)

    def check(self) -> None:
        """Raise UserError when a tensor that was read contained NaN or infinity."""
        for reader in self.readers:
            reader.check()


def is_averaged(tensor: TensorId) -> bool:
    """Whether the tensor belongs to no expert and no router."""
    return tensor.expert is None and not tensor.is_router and not tensor.is_shared


def check_shapes(mixture: Mixture, names: Sequence[str]) -> None:
    """Raise UserError unless the sources have the expected shapes, as they may not where `allow`
    permits differences. names: of the readers."""
    base = mixture.base.slots
    averaged = [t for t in slots(mixture.model) if is_averaged(t) and t in base]
    for number in mixture.averaged():
        other = mixture.readers[number].slots
        for tensor in averaged:
            rows = 1 if tensor in VOCABULARY else 0  # vocabularies may differ where allowed
            if tensor not in other or other[tensor].shape[rows:] != base[tensor].shape[rows:]:
                raise UserError(
                    f"{names[number]}: {tensor} has a different shape from that in"
                    f" {mixture.recipe.base_model}; it cannot be averaged"
                )


def make_tensor(mixture: Mixture, tensor: TensorId) -> np.ndarray:
    """Make a tensor of the mixture, in its dtype."""
    recipe, dtype = mixture.recipe, mixture.dtype
    if tensor.is_router:
        assert tensor.layer is not None
        return mixture.gates[tensor.layer, : recipe.expert_count].astype(dtype)
    if tensor.is_shared and not recipe.shared_experts:
        return _zeros(mixture, tensor)
    if tensor.part == SHARED_GATE:
        assert tensor.layer is not None
        return mixture.gates[tensor.layer, recipe.expert_count :].astype(dtype)
    if is_averaged(tensor):
        if tensor in mixture.solved:
            return mixture.solved[tensor]
        if tensor not in mixture.base.slots:
            return _zeros(mixture, tensor)
        return mixture.shared.make(tensor)

    if tensor.is_shared:
        pieces: Sequence[Piece] = [Piece(len(recipe.experts), 0, 1)]
    else:
        assert tensor.expert is not None
        d_ff = mixture.base.model.d_ff
        made = cut(recipe.method, len(recipe.experts), recipe.chunks, d_ff)
        pieces = made.made_of(tensor.expert)
    axis = 1 if tensor.part.endswith("/down") else 0  # d_ff
    dense, rng = tensor.of_dense(), generator(recipe.seed, tensor)
    parts = [
        _changed(_piece(mixture, piece, dense, axis), recipe.sources[piece.source], dense, rng)
        for piece in pieces
    ]
    return cast(tensor, parts[0] if len(parts) == 1 else np.concatenate(parts, axis), dtype)


def _zeros(mixture: Mixture, tensor: TensorId) -> np.ndarray:
    """Make a tensor that the mixture's class requires and no source has."""
    return np.zeros(slots(mixture.model)[tensor].shape, mixture.dtype)


def _piece(mixture: Mixture, piece: Piece, dense: TensorId, axis: int) -> np.ndarray:
    array = mixture.readers[mixture.source_of[piece.source]].read(dense)
    if piece.pieces == 1:
        return array
    width = array.shape[axis] // piece.pieces
    return array.take(range(piece.number * width, (piece.number + 1) * width), axis)


def _changed(
    array: np.ndarray, expert: ExpertSource, dense: TensorId, rng: np.random.Generator
) -> np.ndarray:
    """The array with noise_scale applied to feed-forward weights, then residual_scale to the down
    projection, each rounded to the source's dtype as in mergekit. Bit-identical if neither is
    set."""
    stored = array.dtype
    if expert.noise_scale:
        noise = rng.standard_normal(array.shape, np.float32) * np.float32(expert.noise_scale)
        array = cast(dense, wide(array) + noise, stored)
    if dense.part == "ffn/down" and expert.residual_scale != 1:
        with np.errstate(over="ignore"):
            scaled = wide(array) * np.float32(expert.residual_scale)
        array = cast(dense, scaled, stored)
    return array
