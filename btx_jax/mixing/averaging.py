"""Merge the tensors that models share, one at a time, from readers of the models. Memory holds no
more than the sources of one tensor."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btx_jax.architectures.tensors import Reader, TensorId
from btx_jax.architectures.values import cast, check_range, is_finite
from btx_jax.config.merges import READ_BASE
from btx_jax.mixing.merge import MERGES


def generator(seed: int, tensor: TensorId) -> np.random.Generator:
    """A random generator for one tensor, independent of the order in which tensors are made."""
    return np.random.default_rng([seed, zlib.crc32(str(tensor).encode())])


@dataclass(frozen=True)
class Shared:
    """Merges the tensors that experts share, one at a time.

    merge, settings: the method, a key of MERGES, and its settings. base: the model that determines
    shapes and from which changes are measured. readers: of the distinct models. dtype: of the
    result. seed: for random numbers.
    """

    merge: str
    settings: Mapping[str, float]
    base: Reader
    readers: Sequence[Reader]
    dtype: np.dtype
    seed: int

    def make(self, tensor: TensorId, seen: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Merge a tensor. seen: for merges solved from text, what `merge.solved` takes for each
        model.

        Raises UserError for values beyond the range of dtype; values that were not finite in the
        sources are not reported here.
        """
        arrays = [reader.read(tensor) for reader in self.readers]
        is_whole = arrays[0].shape == self.base.slots[tensor].shape
        if len(arrays) == 1 and is_whole and self.merge not in READ_BASE:
            return cast(tensor, arrays[0], self.dtype)
        whole = self.base.read(tensor) if self.merge in READ_BASE else None
        blocks = []
        with np.errstate(over="ignore", invalid="ignore"):
            for rows, having in self._having(arrays, tensor):
                parts = [arrays[i][rows] for i in having] or [self.base.read(tensor)[rows]]
                own = None if whole is None else whole[rows]
                solving: dict[str, Sequence[np.ndarray]] = {}
                if seen is not None and having:
                    # For an embedding, each row has its own counts; for the head, all rows share
                    # them.
                    solving["seen"] = [
                        seen[i][rows] if seen[i].ndim == 1 else seen[i] for i in having
                    ]
                rng = generator(self.seed, tensor)
                made = MERGES[self.merge].make(
                    own, parts, self.dtype, rng, **self.settings, **solving
                )
                blocks.append(made)
        result = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        if is_finite(result):
            result.flags.writeable = False  # as from a reader: marks values as checked
        elif all(map(is_finite, arrays)):
            check_range(tensor, result)
        return result

    def is_right(self, tensor: TensorId, found: np.ndarray) -> bool:
        """Whether `found` is the merged tensor, by the merge's independent check. Only for merges
        that have one."""
        is_right = MERGES[self.merge].is_right
        assert is_right
        arrays = [reader.read(tensor) for reader in self.readers]
        same_kind = found.dtype == self.dtype and found.shape == self.base.slots[tensor].shape
        return same_kind and all(
            is_right(
                found[rows], [arrays[i][rows] for i in having] or [self.base.read(tensor)[rows]]
            )
            for rows, having in self._having(arrays, tensor)
        )

    def _having(
        self, arrays: Sequence[np.ndarray], tensor: TensorId
    ) -> list[tuple[slice, list[int]]]:
        """Blocks of rows of the base's tensor, each with the indices of the models that have these
        rows; a single block unless vocabularies differ. Rows that no model has come from the
        base."""
        rows = self.base.slots[tensor].shape[0]
        ends = sorted({min(len(array), rows) for array in arrays} | {rows})
        return [
            (slice(start, end), [i for i, array in enumerate(arrays) if len(array) >= end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
