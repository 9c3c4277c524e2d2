"""A model as individual tensors in the layout of Hugging Face files, where a Linear's weight is
[out, in]. All streaming code identifies tensors by TensorId, whatever a file calls them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import linen as nn

from btx_jax.config.model_config import ModelConfig
from btx_jax.models.llama import abstract_params
from btx_jax.models.lora import is_adapter

# Leaves that are linear maps -> the number of leading axes that are inputs. All other leaves have
# the same layout on both sides.
_INPUTS = {
    **dict.fromkeys(("attention/query", "attention/key", "attention/value"), 1),
    "attention/out": 2,
    **dict.fromkeys(("ffn/gate", "ffn/up", "ffn/down", "ffn/router"), 1),
    **{f"shared_expert/{name}": 1 for name in ("gate", "up", "down", "router")},
    **dict.fromkeys(("anchor/gate", "anchor/up", "anchor/down"), 1),
    "head/kernel": 1,
}
# In the order of computation within a layer, with the names in files of Llama, Mixtral and
# Qwen2-MoE, or analogous names for norms that those lack.
_ATTENTION = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key": "self_attn.k_proj.weight",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value": "self_attn.v_proj.weight",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/out_bias": "self_attn.o_proj.bias",
    "attention_post_norm/scale": "self_attn.post_norm.weight",
    "ffn_norm/scale": "post_attention_layernorm.weight",
}
_DENSE = {
    "ffn/gate": "mlp.gate_proj.weight",
    "ffn/gate_bias": "mlp.gate_proj.bias",
    "ffn/up": "mlp.up_proj.weight",
    "ffn/up_bias": "mlp.up_proj.bias",
    "ffn/down": "mlp.down_proj.weight",
    "ffn/down_bias": "mlp.down_proj.bias",
}
_POST_NORM = {"ffn_post_norm/scale": "mlp.post_norm.weight"}
_SHARED = {
    "shared_expert/gate": "mlp.shared_expert.gate_proj.weight",
    "shared_expert/up": "mlp.shared_expert.up_proj.weight",
    "shared_expert/down": "mlp.shared_expert.down_proj.weight",
    "shared_expert/router": "mlp.shared_expert_gate.weight",
}
_ANCHOR = {  # under the names of the dense model whose feed-forward became the anchor
    f"anchor/{name}": _DENSE[f"ffn/{name}"] for name in ("gate", "up", "down")
}
_ROUTER = {
    "ffn/router": "block_sparse_moe.gate.weight",
    "ffn/router_bias": "block_sparse_moe.gate.bias",
}
_EXPERT = {"ffn/gate": "w1", "ffn/down": "w2", "ffn/up": "w3"}
_OUTSIDE = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}


class TensorId(NamedTuple):
    """Identifies a tensor of a model.

    part: its leaf path without the run of layers, such as ffn/gate. layer, expert: None for tensors
    outside the layers, and for those that do not belong to one expert.

    str() is the name that Llama or Mixtral files use, whatever the model: messages show it, and
    model digests are computed over it.
    """

    part: str
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return _OUTSIDE[self.part]
        if self.expert is not None:
            name = f"block_sparse_moe.experts.{self.expert}.{_EXPERT[self.part]}.weight"
        else:
            name = (_ATTENTION | _POST_NORM | _DENSE | _SHARED | _ANCHOR | _ROUTER)[self.part]
        return f"model.layers.{self.layer}.{name}"

    @property
    def is_router(self) -> bool:
        """Whether it belongs to the router of the routed experts (weight or bias)."""
        return self.part in _ROUTER

    @property
    def is_anchor(self) -> bool:
        return self.part in _ANCHOR

    @property
    def is_shared(self) -> bool:
        """Whether it belongs to a shared expert, its gate included."""
        return self.part.startswith("shared_expert/")

    def of_dense(self) -> "TensorId":
        """The dense model's tensor from which this tensor of an expert, a shared expert or an
        anchor is made."""
        return TensorId("ffn/" + self.part.split("/")[1], self.layer)


EMBEDDING, HEAD = TensorId("embed/embedding"), TensorId("head/kernel")


Range = tuple[int, int]  # [start, stop)
Region = tuple[Range, ...]  # one range for each axis of an array


class Slot(NamedTuple):
    """Where one tensor is stored in our parameters.

    path: of the leaf. indices: into its leading axes (layer in its run, expert). inputs: number of
    leading axes of `part` that are inputs of a linear map; 0 for tensors with the same layout on
    both sides.
    """

    path: tuple[str, ...]
    indices: tuple[int, ...]
    shape: tuple[int, ...]  # in the file
    part: tuple[int, ...]  # in our leaf, at `indices`
    inputs: int

    @property
    def transposed(self) -> bool:
        return self.inputs > 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.part)

    def region_to_ours(
        self, region: Region, read: Callable[[Range, Range | None], np.ndarray]
    ) -> np.ndarray:
        """Read a region of our part. read: (rows, columns) -> that block of the file's tensor;
        columns is None for vectors."""
        first = self.inputs or len(self.part) - len(self.shape) + 1
        axes = [slice(first), slice(first, None)]  # part axes that form one tensor axis
        flat = [_flat(self.part[group], region[group]) for group in axes]
        if len(self.shape) == 1:
            tensor = read(flat[0], None)
        elif self.transposed:
            tensor = read(flat[1], flat[0]).T
        else:
            tensor = read(flat[0], flat[1])
        # `read` has cut along the first axis of each group; cut along the others here.
        sizes, rest = list(self.part), [slice(*along) for along in region]
        for axis in {0, first} & set(range(len(sizes))):
            sizes[axis], rest[axis] = region[axis][1] - region[axis][0], slice(None)
        return tensor.reshape(sizes)[tuple(rest)]

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        return (
            _transposed(part.reshape(self.shape[::-1]))
            if self.transposed
            else part.reshape(self.shape)
        )


class Reader(Protocol):
    """Reads the tensors of a model one at a time."""

    model: ModelConfig
    slots: dict[TensorId, Slot]
    dtypes: dict[TensorId, np.dtype]

    def read(self, tensor: TensorId) -> np.ndarray:
        """The tensor, as a read-only array whose values have been checked."""
        ...

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        """The region of the tensor in our layout (`Slot.to_ours`), reading as few bytes as
        possible."""
        ...

    def check(self) -> None:
        """Raise UserError when a tensor that was read held NaN or infinity."""
        ...


def _transposed(array: np.ndarray) -> np.ndarray:
    """Transposed copy, made in square blocks that fit a core's cache: two to three times as fast as
    numpy's copy of a large matrix."""
    side = 64
    turned = np.empty(array.shape[::-1], array.dtype)
    for i in range(0, array.shape[0], side):
        for j in range(0, array.shape[1], side):
            turned[j : j + side, i : i + side] = array[i : i + side, j : j + side].T
    return turned


@functools.lru_cache(maxsize=8)
def slots(model: ModelConfig) -> dict[TensorId, Slot]:
    """Every tensor of the model and its slot, in order of computation. LoRA experts have none."""
    leaves = _leaf_shapes(model)
    result: dict[TensorId, Slot] = {}

    def add(tensor: TensorId, prefix: tuple[str, ...], index: tuple[int, ...]) -> None:
        path = (*prefix, *tensor.part.split("/"))
        if path not in leaves:
            return  # the model lacks this tensor
        part = leaves[path][len(index) :]
        inputs = _INPUTS.get(tensor.part, 0)
        shape = (_size(part[inputs:]), _size(part[:inputs])) if inputs else part
        if not inputs and tensor.part != EMBEDDING.part:
            shape = (_size(part),)  # vectors, with heads flattened
        result[tensor] = Slot(path, index, shape, part, inputs)

    add(EMBEDDING, (), ())
    layer = 0
    for run, length, spec in model.runs():
        for offset in range(length):
            for part in _ATTENTION:
                add(TensorId(part, layer), (run,), (offset,))
            if spec.experts:
                for part in _ROUTER:
                    add(TensorId(part, layer), (run,), (offset,))
                for expert in range(spec.experts):
                    for part in _EXPERT:
                        add(TensorId(part, layer, expert), (run,), (offset, expert))
            for part in _SHARED | _ANCHOR if spec.experts else _DENSE:
                add(TensorId(part, layer), (run,), (offset,))
            for part in _POST_NORM:
                add(TensorId(part, layer), (run,), (offset,))
            layer += 1
    add(TensorId("final_norm/scale"), (), ())
    add(HEAD, (), ())
    missing = {path for path in leaves if not is_adapter(path)} - {
        slot.path for slot in result.values()
    }
    assert not missing, f"leaves without a tensor: {missing}"
    return result


def _flat(shape: tuple[int, ...], region: Region) -> Range:
    """The range that a region covers when the shape's axes are merged into one; the region must
    span all axes but the first in full."""
    inner = _size(shape[1:])
    return (region[0][0] * inner, region[0][1] * inner) if shape else (0, 1)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=int))


def _leaf_shapes(model: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))
            else:
                shapes[(*path, key)] = value.shape

    walk(nn.unbox(abstract_params(model)), ())
    return shapes
