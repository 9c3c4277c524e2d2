"""Readers for branches with a base: one presents a branch as a whole model, the other presents the
base as the part that the branch keeps."""

from pathlib import Path

import numpy as np

from btx_jax.architectures.tensors import Reader, Region, TensorId, slots
from btx_jax.checkpoints.base import base_digest, require_digest, tensor_digest
from btx_jax.checkpoints.training_state import Base, StepReader
from btx_jax.config.model_config import ModelConfig


class AnchorReader:
    """Reads a dense model as the parameters that a branch with an anchor takes from it: its
    feed-forwards become the anchor's."""

    def __init__(self, dense: Reader, model: ModelConfig):
        """model: the branch's config."""
        self.model = model
        kept = {tensor: _in_dense(tensor) for tensor in slots(model)}
        self.slots = {t: slots(model)[t] for t, under in kept.items() if under in dense.slots}
        self.dtypes = {tensor: dense.dtypes[kept[tensor]] for tensor in self.slots}
        self.by_leaf = getattr(dense, "by_leaf", False)
        self.check = dense.check
        self._dense = dense

    def read(self, tensor: TensorId) -> np.ndarray:
        return self._dense.read(_in_dense(tensor))

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        return self._dense.read_region(_in_dense(tensor), region)


def _in_dense(tensor: TensorId) -> TensorId:
    return tensor.of_dense() if tensor.is_anchor else tensor


class BranchReader:
    """Reads a branch as a whole model: its own tensors from its step, all others from its base. All
    are float32, as in training, whatever the dtype of the base."""

    def __init__(self, own: StepReader, under: Reader, base: Base, path: Path):
        """base: the path that `under` reads, and the expected digest. path: of the branch."""
        self.model, self.slots = own.model, slots(own.model)
        self.dtypes = dict.fromkeys(self.slots, np.dtype(np.float32))
        self.by_leaf = own.by_leaf or getattr(under, "by_leaf", False)
        self._own, self._under, self._base, self._path = own, under, base, path
        self._hashes: dict[TensorId, str] = {}

    def read(self, tensor: TensorId) -> np.ndarray:
        if tensor in self._own.slots:
            return _float32(self._own.read(tensor))
        array = _float32(self._under.read(tensor))
        self._hashes[tensor] = tensor_digest(array)
        return array

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        reader = self._own if tensor in self._own.slots else self._under
        return _float32(reader.read_region(tensor, region))

    def check(self) -> None:
        """Read the rest of the base. Raises UserError when it is not the base that the branch was
        trained on, or a tensor that was read contained NaN or infinity."""
        for tensor in self.slots:
            if tensor not in self._own.slots and tensor not in self._hashes:
                self.read(tensor)
        self._own.check()
        self._under.check()
        held = Base(self._base.path, base_digest(self._hashes))
        require_digest(held, self._base.digest, self._path)


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        return array
    array = array.astype(np.float32)
    array.flags.writeable = False
    return array
