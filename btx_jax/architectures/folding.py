"""Fold parameterless LayerNorms into RMSNorms, for classes without LayerNorm.

A LayerNorm subtracts the mean of the residual stream, and nothing else reads that mean. If
everything added to the stream has zero mean, so has the stream, and the two norms are equal.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from btx_jax.architectures.tensors import EMBEDDING, Reader, Region, TensorId, slots
from btx_jax.config.model_config import ModelConfig

# Tensors whose product is added to the stream -> their axis along the stream.
_ALONG = {
    EMBEDDING.part: 1,
    **dict.fromkeys(("attention/out", "attention/out_bias", "ffn/down"), 0),
    **dict.fromkeys(("shared_expert/down", "anchor/down"), 0),
}


def folded(model: ModelConfig) -> ModelConfig:
    """The model with LayerNorms replaced by RMSNorms with scales of one."""
    return dataclasses.replace(model, norm="rms")


def folding(
    read: Callable[[TensorId], np.ndarray], model: ModelConfig
) -> Callable[[TensorId], np.ndarray]:
    """Wrap `read`, which returns tensors of a model with LayerNorms, to return those of the folded
    model: tensors that write to the stream have their mean subtracted, in float32, and norm scales
    are ones."""
    own, places = slots(model), slots(folded(model))

    def read_folded(tensor: TensorId) -> np.ndarray:
        if tensor not in own:
            return np.ones(places[tensor].shape, np.float32)
        if tensor.part not in _ALONG:
            return read(tensor)
        array = read(tensor).astype(np.float32)
        mean = array.mean(_ALONG[tensor.part], np.float64, keepdims=True)
        return array - mean.astype(np.float32)

    return read_folded


class Folded:
    """Reader that presents a model with LayerNorms as its folded form."""

    def __init__(self, reader: Reader):
        self.model = folded(reader.model)
        self.slots = slots(self.model)
        float32 = np.dtype(np.float32)
        self.dtypes = {
            tensor: float32 if tensor.part in _ALONG else reader.dtypes.get(tensor, float32)
            for tensor in self.slots
        }
        self.by_leaf = getattr(reader, "by_leaf", False)
        self.check = reader.check
        self._read = folding(reader.read, reader.model)

    def read(self, tensor: TensorId) -> np.ndarray:
        array = self._read(tensor)
        array.flags.writeable = False
        return array

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        whole = self.slots[tensor].to_ours(self.read(tensor))
        return whole[tuple(slice(*along) for along in region)]
