"""Hugging Face checkpoint directories of Llama, Mistral and Mixtral: one key table for both
directions.

Everything that streams speaks of tensors by their Hugging Face names and layouts (a Linear's weight
is [out, in]), Mixtral's in the layout of one tensor per expert, which all versions of transformers
read. `slots` says where each of them lies in our parameters.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from btx_jax.checkpoints.huggingface_config import (
    config_from_model,
    experts_per_token,
    model_from_config,
)
from btx_jax.checkpoints.safetensors_files import (
    DTYPES,
    INDEX,
    SINGLE,
    SafetensorsFile,
    ShardWriter,
)
from btx_jax.errors import UserError
from btx_jax.model_config import ModelConfig
from btx_jax.models.llama import abstract_params
from btx_jax.models.lora import is_adapter

SHOWN = 12  # problems listed in full before "and n more"


class _Row(NamedTuple):
    """in_axes: how many leading axes of our kernel a Linear multiplies by; 0 for what is stored
    alike on both sides."""

    ours: str
    theirs: str
    in_axes: int


# l: layer, e: expert. Kernels here are [in..., out...], there [out, in] with heads flattened.
_OUTSIDE = (
    _Row("embed/embedding", "model.embed_tokens.weight", 0),
    _Row("final_norm/scale", "model.norm.weight", 0),
    _Row("head/kernel", "lm_head.weight", 1),
)
_LAYER = (
    _Row("attention_norm/scale", "model.layers.{l}.input_layernorm.weight", 0),
    _Row("attention/query", "model.layers.{l}.self_attn.q_proj.weight", 1),
    _Row("attention/key", "model.layers.{l}.self_attn.k_proj.weight", 1),
    _Row("attention/value", "model.layers.{l}.self_attn.v_proj.weight", 1),
    _Row("attention/out", "model.layers.{l}.self_attn.o_proj.weight", 2),
    _Row("ffn_norm/scale", "model.layers.{l}.post_attention_layernorm.weight", 0),
)
_DENSE = (
    _Row("ffn/gate", "model.layers.{l}.mlp.gate_proj.weight", 1),
    _Row("ffn/up", "model.layers.{l}.mlp.up_proj.weight", 1),
    _Row("ffn/down", "model.layers.{l}.mlp.down_proj.weight", 1),
)
_ROUTER = _Row("ffn/router", "model.layers.{l}.block_sparse_moe.gate.weight", 1)
_EXPERT = (
    _Row("ffn/gate", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", 1),
    _Row("ffn/down", "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", 1),
    _Row("ffn/up", "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", 1),
)
# transformers 5 stores all experts of a layer in two tensors: gate_up_proj [E, 2 F, D], gate rows
# first, and down_proj [E, D, F].
_FUSED = {
    "model.layers.{l}.mlp.gate.weight": "model.layers.{l}.block_sparse_moe.gate.weight",
    "model.layers.{l}.mlp.experts.gate_up_proj": None,
    "model.layers.{l}.mlp.experts.down_proj": None,
}
_EXPERT_NAME = re.compile(
    r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight"
)
_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # saved by early versions, computed by all


class Slot(NamedTuple):
    """Where one tensor lies in our parameters: leaf path, index of its leading axes (layer in its
    run, expert), its shapes."""

    path: tuple[str, ...]
    indices: tuple[int, ...]
    shape: tuple[int, ...]  # there
    part: tuple[int, ...]  # here: of the leaf at index
    transposed: bool

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.part)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        return (
            np.ascontiguousarray(part.reshape(self.shape[::-1]).T)
            if self.transposed
            else part.reshape(self.shape)
        )


@functools.lru_cache(maxsize=8)
def slots(model: ModelConfig) -> dict[str, Slot]:
    """Every tensor of the model under its Hugging Face name, in the order in which layers are
    computed. LoRA experts have none."""
    leaves = _leaf_shapes(model)
    result: dict[str, Slot] = {}

    def add(row: _Row, name: str, prefix: tuple[str, ...], index: tuple[int, ...]) -> None:
        path = (*prefix, *row.ours.split("/"))
        if path not in leaves:
            return  # lm_head of a tied model
        part = leaves.pop(path) if not index else leaves[path][len(index) :]
        inputs, outputs = (
            int(np.prod(part[: row.in_axes], dtype=int)),
            int(np.prod(part[row.in_axes :], dtype=int)),
        )
        result[name] = Slot(
            path, index, (outputs, inputs) if row.in_axes else part, part, bool(row.in_axes)
        )

    embed, norm, head = _OUTSIDE
    add(embed, embed.theirs, (), ())
    layer = 0
    for run, length, spec in model.runs():
        for offset in range(length):
            for row in (
                _LAYER + (() if spec.experts else _DENSE) + ((_ROUTER,) if spec.experts else ())
            ):
                add(row, row.theirs.format(l=layer), (run,), (offset,))
            for expert in range(spec.experts):
                for row in _EXPERT:
                    add(row, row.theirs.format(l=layer, e=expert), (run,), (offset, expert))
            layer += 1
    add(norm, norm.theirs, (), ())
    add(head, head.theirs, (), ())
    unmapped = {path for path in leaves if not is_adapter(path)} - {
        slot.path for slot in result.values()
    }
    assert not unmapped, f"leaves without a Hugging Face name: {unmapped}"
    return result


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


class ExpertTensor(NamedTuple):
    """part: gate, down or up."""

    layer: int
    expert: int
    part: str


_PARTS = {"1": "gate", "2": "down", "3": "up"}


def expert_tensor(name: str) -> ExpertTensor | None:
    """What an expert's tensor name says, or None for any other tensor."""
    match = _EXPERT_NAME.fullmatch(name)
    return ExpertTensor(int(match[1]), int(match[2]), _PARTS[match[3]]) if match else None


def expert_name(layer: int, expert: int, part: str) -> str:
    return next(
        row.theirs.format(l=layer, e=expert) for row in _EXPERT if row.ours == f"ffn/{part}"
    )


def dense_name(layer: int, part: str) -> str:
    """Of a dense layer's feed-forward tensor; part as in ExpertTensor."""
    return next(row.theirs.format(l=layer) for row in _DENSE if row.ours == f"ffn/{part}")


def router_name(layer: int) -> str:
    return _ROUTER.theirs.format(l=layer)


def router_layer(name: str) -> int | None:
    """The layer whose router this is, or None for any other tensor."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight", name)
    return int(match[1]) if match else None


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, from the exponent bits: one pass over the bytes,
    whatever the dtype."""
    mask = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[array.dtype.name]
    bits: np.ndarray = array.reshape(-1).view(np.uint32 if array.itemsize == 4 else np.uint16)
    step = 1 << 18  # fits a core's cache
    return all(
        int(np.bitwise_and(bits[i : i + step], mask).max(initial=0)) < mask
        for i in range(0, bits.size, step)
    )


def is_huggingface(path: Path) -> bool:
    """By config.json: a run of ours keeps one too, which names no model_type."""
    if (path / "adapter_config.json").is_file():
        return True
    config = path / "config.json"
    return config.is_file() and (
        not (path / "checkpoints").is_dir()
        or '"model_type"' in config.read_text("utf-8", "replace")
    )


def read_config(directory: Path) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json alone. Raises UserError."""
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory} is a LoRA adapter, not a model; merge it into its base first (peft:"
            " merge_and_unload)"
        )
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    if "stage" in config and "model_type" not in config:
        if config["stage"] == "pipeline":
            raise UserError(
                f"{directory} is a pipeline's directory; name one of its runs:"
                f" {', '.join(config.get('pipeline') or ())}"
            )
        raise UserError(f"{directory} is a run that has saved no checkpoint yet")
    try:
        return model_from_config(config, str(path))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a value of the wrong kind: {type(error).__name__}: {error}"
        ) from error


class HuggingFaceReader:
    """Reads the tensors of a directory by their names. Everything but their values is checked at
    once, here.

    Raises UserError listing all unknown, missing, duplicate, misshapen or mistyped tensors. `read`
    notes NaN and infinity, for `check`.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.model = read_config(directory)
        self.slots = slots(self.model)
        problems: list[str] = []
        self._stored = _locate(directory, problems)
        self._where = {name: (name, None, None) for name in self._stored}
        if self.model.moe:
            self._where |= self._fused(problems)
        self._compare(problems)
        raise_problems(directory, problems)
        self.dtypes = {name: self._dtype(name) for name in self.slots}
        self._bad_values: list[str] = []

    def _fused(self, problems: list[str]) -> dict[str, Any]:
        """Views of transformers 5's tensors under the names of single experts."""
        found: dict[str, Any] = {}
        d_ff, d_model = self.model.d_ff, self.model.d_model
        for layer, spec in enumerate(self.model.layer_specs()):
            router, gate_up, down = (name.format(l=layer) for name in _FUSED)
            expected = {
                gate_up: (spec.experts, 2 * d_ff, d_model),
                down: (spec.experts, d_model, d_ff),
            }
            for name, shape in expected.items():
                if name in self._stored and self._stored[name].tensors[name].shape != shape:
                    problems.append(
                        f"{name} is {self._stored[name].tensors[name].shape}, not {shape}"
                    )
            if router in self._stored:
                found[router_name(layer)] = (router, None, None)
            for expert in range(spec.experts):
                gate_name, down_name, up_name = (
                    row.theirs.format(l=layer, e=expert) for row in _EXPERT
                )
                if gate_up in self._stored:
                    found[gate_name] = (gate_up, expert, (0, d_ff))
                    found[up_name] = (gate_up, expert, (d_ff, 2 * d_ff))
                if down in self._stored:
                    found[down_name] = (down, expert, None)
        both = sorted(set(found) & set(self._stored))
        problems += [f"{name} twice, alone and fused" for name in both]
        return found

    def _compare(self, problems: list[str]) -> None:
        used = {stored for name, (stored, *_) in self._where.items() if name in self.slots}
        for name in self._stored:
            if name in used or _BUFFER.fullmatch(name):
                continue
            if name == "lm_head.weight" and self.model.tied_head:
                if self._is_head_tied():
                    continue
                problems.append(
                    "lm_head.weight differs from the embedding, but config.json says"
                    " tie_word_embeddings"
                )
            else:
                problems.append(f"unknown {name}")
        for name, slot in self.slots.items():
            if name not in self._where:
                hint = (
                    "; config.json should say tie_word_embeddings?"
                    if name == "lm_head.weight"
                    else ""
                )
                problems.append(f"missing {name}{hint}")
                continue
            stored, index, _ = self._where[name]
            tensor = self._stored[stored].tensors[stored]
            if tensor.dtype not in DTYPES:
                problems.append(f"{stored} is {tensor.dtype}, not one of {', '.join(DTYPES)}")
            elif index is None and tensor.shape != slot.shape:
                problems.append(f"{stored} is {tensor.shape}, not {slot.shape}")

    def _is_head_tied(self) -> bool:
        head, embedding = (
            (
                self._stored[name].read(name)
                if name in self._stored and self._stored[name].tensors[name].dtype in DTYPES
                else None
            )
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        return (
            head is not None
            and embedding is not None
            and head.dtype == embedding.dtype
            and np.array_equal(head, embedding)
        )

    def _dtype(self, name: str) -> np.dtype:
        stored = self._where[name][0]
        return DTYPES[self._stored[stored].tensors[stored].dtype]

    def read(self, name: str) -> np.ndarray:
        stored, index, rows = self._where[name]
        array = self._stored[stored].read(stored, index, rows)
        if not is_finite(array):
            self._bad_values.append(name)
        array.flags.writeable = False
        return array

    def check(self) -> None:
        """Raises UserError when a tensor that was read held NaN or infinity."""
        raise_problems(
            self.directory,
            [f"NaN or infinity in {name}" for name in dict.fromkeys(self._bad_values)],
        )


def raise_problems(directory: Path, problems: Sequence[str]) -> None:
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(f"{directory}: {count}{'; '.join(problems[:SHOWN])}{rest}")


def _locate(directory: Path, problems: list[str]) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it, by the index or from the single file."""
    index_path = directory / INDEX
    if not index_path.exists():
        if not (directory / SINGLE).exists():
            pickles = sorted(
                path.name
                for pattern in ("*.bin", "*.pt", "*.pth")
                for path in directory.glob(pattern)
            )
            if pickles:
                raise UserError(
                    f"{directory}: {pickles[0]} is a pickle, which can run any code when it is"
                    " read; save the model as safetensors (transformers:"
                    " model.save_pretrained(DIR))"
                )
            raise UserError(f"{directory}: no {SINGLE} and no {INDEX}")
        file = SafetensorsFile(directory / SINGLE)
        return dict.fromkeys(file.tensors, file)
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("weight_map must map tensors to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index_path}: damaged: {error}") from error
    if (directory / SINGLE).exists() and SINGLE not in weight_map.values():
        raise UserError(
            f"{directory} holds both {SINGLE} and {INDEX}, which does not name it; delete the one"
            " that is out of date"
        )
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        path = PurePosixPath(name)
        if path.is_absolute() or len(path.parts) != 1 or name in ("", ".", "..") or "\\" in name:
            raise UserError(
                f"{index_path}: {name!r} is no file of this directory; refusing to read it"
            )
        if not (directory / name).exists():
            problems.append(f"missing shard {name}")
            continue
        files[name] = SafetensorsFile(directory / name)
    counts = Counter(tensor for file in files.values() for tensor in file.tensors)
    problems += [f"{tensor} in {count} shards" for tensor, count in counts.items() if count > 1]
    located = {tensor: file for file in files.values() for tensor in file.tensors}
    for tensor, name in items:
        if name in files and tensor not in files[name].tensors:
            problems.append(f"{tensor} is not in {name}, where the index says")
    problems += [
        f"{tensor} is in a shard but not in the index"
        for tensor in located
        if tensor not in weight_map
    ]
    return located


class HuggingFaceWriter:
    """Writes a model into a directory, tensor by tensor; `finish` adds the small files.

    dtypes: name -> numpy dtype of each tensor, in the order in which they will be written. Raises
    UserError when Hugging Face has no such model.
    """

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        dtypes: Mapping[str, np.dtype],
        shard_bytes: int = 5_000_000_000,
    ):
        if model.moe:
            experts_per_token(model)
        self.model, self._directory = model, directory
        self._dtypes = dtypes
        shapes = {name: (slots(model)[name].shape, dtype) for name, dtype in dtypes.items()}
        self._shards = ShardWriter(directory, shapes, shard_bytes)

    def write(self, name: str, tensor: np.ndarray) -> None:
        self._shards.write(name, tensor)

    @property
    def sha256(self) -> dict[str, str]:
        """Of the files of tensors that are finished."""
        return self._shards.sha256

    def finish(self, bos: int | None, eos: int | None, card: str) -> None:
        """config.json, generation_config.json and the model card; the tokenizer is the caller's."""
        self._shards.finish()
        usual = Counter(self._dtypes.values()).most_common(1)[0][0].name
        config = config_from_model(self.model, usual, bos, eos)
        generation = {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos}
        for name, values in (("config.json", config), ("generation_config.json", generation)):
            if not (self._directory / name).exists():  # one that came with the tokenizer says more
                (self._directory / name).write_text(
                    json.dumps(values, indent=2) + "\n", encoding="utf-8"
                )
        (self._directory / "README.md").write_text(card, encoding="utf-8")
