"""Hugging Face checkpoint directories of Llama, Mistral and Mixtral: one key table for both
directions.

Everything that streams speaks of tensors by their Hugging Face names and layouts (a Linear's weight
is [out, in]), Mixtral's in the layout of one tensor per expert, which all versions of transformers
read. `slots` says where each of them lies in our parameters.
"""

import dataclasses
import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from btx_jax.checkpoints.checksums import check_sums, read_sums
from btx_jax.checkpoints.huggingface_config import (
    ARCHITECTURES,
    class_names,
    config_from_model,
    experts_per_token,
    kept_config,
    model_from_config,
    needed_transformers,
)
from btx_jax.checkpoints.safetensors_files import (
    DTYPES,
    INDEX,
    READABLE,
    SINGLE,
    SafetensorsFile,
    ShardWriter,
)
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.models.llama import abstract_params
from btx_jax.models.lora import is_adapter

log = logging.getLogger(__name__)

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
# transformers 5 keeps all experts of a layer in two tensors: gate_up_proj [E, 2 F, D], gate rows
# first, and down_proj [E, D, F].
_FUSED = ("model.layers.{l}.mlp.experts.gate_up_proj", "model.layers.{l}.mlp.experts.down_proj")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HEADLESS = (
    " (a base model was saved, without its head: save what AutoModelForCausalLM loads; or, if the"
    " head is the embedding, let config.json say tie_word_embeddings)"
)
_EXPERT_NAME = re.compile(
    r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight"
)
_BUFFER = re.compile(r"rotary_emb\.inv_freq")  # saved by early versions, computed by all


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
            _transposed(part.reshape(self.shape[::-1]))
            if self.transposed
            else part.reshape(self.shape)
        )


def _transposed(array: np.ndarray) -> np.ndarray:
    """In squares, of which source and copy stay in a core's cache: two to three times as fast as
    numpy's own copy of a large matrix."""
    side = 64
    turned = np.empty(array.shape[::-1], array.dtype)
    for i in range(0, array.shape[0], side):
        for j in range(0, array.shape[1], side):
            turned[j : j + side, i : i + side] = array[i : i + side, j : j + side].T
    return turned


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
    """The model of a Hugging Face directory, from its config.json; from its weights only whether a
    head that should be tied is. Raises UserError."""
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory} is a LoRA adapter, not a model; merge it into its base first (peft:"
            " merge_and_unload)"
        )
    path = directory / "config.json"
    config = _read_json(path)
    if "stage" in config and "model_type" not in config:
        if config["stage"] == "pipeline":
            raise UserError(
                f"{directory} is a pipeline's directory; name one of its runs:"
                f" {', '.join(config.get('pipeline') or ())}"
            )
        raise UserError(f"{directory} is a run that has saved no checkpoint yet")
    try:
        model = model_from_config(config, str(path))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a value of the wrong kind: {type(error).__name__}: {error}"
        ) from error
    if model.tied_head and _has_own_head(directory, model):
        log.warning(
            "%s: says tie_word_embeddings, but lm_head.weight holds other values than the"
            " embedding; both are kept, as transformers does",
            path,
        )
        return dataclasses.replace(model, tied_head=False)
    return model


def read_kept(directory: Path) -> dict[str, Any]:
    """What a Hugging Face directory says beyond its model, for `CheckpointMetadata.huggingface`: of config.json,
    and all of generation_config.json, {} where there is none. Raises UserError."""
    generation = directory / "generation_config.json"
    return {
        "config": kept_config(_read_json(directory / "config.json")),
        "generation_config": _read_json(generation) if generation.is_file() else {},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


class _Stored(NamedTuple):
    """A tensor in a file, or a part of it: of one expert, and of that these rows."""

    file: SafetensorsFile
    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def dtype(self) -> str:
        return self.file.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape

    def read(self) -> np.ndarray:
        """In the dtype it is stored in, or in float32 where that is none of ours."""
        array = self.file.read(self.name, self.expert, self.rows)
        if array.dtype in DTYPES.values():
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32)


class HuggingFaceReader:
    """Reads the tensors of a directory by their names. Everything but their values is checked at
    once, here. model: what `read_config` said of it, if that was asked already.

    Raises UserError listing all unknown, missing, duplicate, misshapen or mistyped tensors. `read`
    notes NaN and infinity, for `check`.
    """

    def __init__(self, directory: Path, model: ModelConfig | None = None):
        self.directory = directory
        self.model = model or read_config(directory)
        self.slots = slots(self.model)
        problems: list[str] = []
        stored = _stored(directory, self.model, problems)
        self._where = dict(stored)
        if self.model.moe:
            self._where |= self._fused(stored, problems)
        if self.model.tied_head and _EMBEDDING not in stored and _HEAD in stored:
            self._where[_EMBEDDING] = stored[_HEAD]
        self._compare(stored, problems)
        if problems:  # damage, in a header, comes first
            names = [name for name in read_sums(directory) if name.endswith(".safetensors")]
            check_sums(directory, names)
        raise_problems(directory, problems)
        self.dtypes = {
            name: DTYPES.get(self._where[name].dtype, np.dtype(np.float32)) for name in self.slots
        }
        if rounded := [name for name in self.slots if self._where[name].dtype == "F64"]:
            log.warning("%s: float64 is rounded to float32, %d tensors", directory, len(rounded))
        self._bad_values: list[str] = []

    def _fused(self, stored: Mapping[str, _Stored], problems: list[str]) -> dict[str, _Stored]:
        """Views of transformers 5's tensors under the names of single experts."""
        found: dict[str, _Stored] = {}
        d_ff, d_model = self.model.d_ff, self.model.d_model
        for layer, spec in enumerate(self.model.layer_specs()):
            gate_up, down = (stored.get(name.format(l=layer)) for name in _FUSED)
            for tensor, shape in (
                (gate_up, (spec.experts, 2 * d_ff, d_model)),
                (down, (spec.experts, d_model, d_ff)),
            ):
                if tensor and tensor.shape != shape:
                    problems.append(f"{tensor.name} is {tensor.shape}, not {shape}")
            for expert in range(spec.experts):
                gate_name, down_name, up_name = (
                    row.theirs.format(l=layer, e=expert) for row in _EXPERT
                )
                if gate_up:
                    found[gate_name] = _Stored(gate_up.file, gate_up.name, expert, (0, d_ff))
                    found[up_name] = _Stored(gate_up.file, gate_up.name, expert, (d_ff, 2 * d_ff))
                if down:
                    found[down_name] = _Stored(down.file, down.name, expert)
        both = sorted(set(found) & set(stored))
        problems += [f"{name} twice, alone and fused" for name in both]
        return found

    def _compare(self, stored: Mapping[str, _Stored], problems: list[str]) -> None:
        used = {self._where[name].name for name in self.slots if name in self._where}
        for name, tensor in stored.items():
            is_copy = name == _HEAD and self.model.tied_head  # equal: read_config has looked
            if not (tensor.name in used or is_copy or _BUFFER.search(name)):
                problems.append(f"unknown {tensor.name}")
        for name, slot in self.slots.items():
            if name not in self._where:
                problems.append(f"missing {name}{_HEADLESS if name == _HEAD else ''}")
                continue
            tensor = self._where[name]
            if tensor.dtype not in READABLE:
                problems.append(
                    f"{tensor.name} is {tensor.dtype}, not one of {', '.join(READABLE)}: such"
                    " weights are not supported"
                )
            elif tensor.expert is None and tensor.shape != slot.shape:
                problems.append(f"{tensor.name} is {tensor.shape}, not {slot.shape}")
        named = class_names(_read_json(self.directory / "config.json"))
        if problems and not set(named) <= set(ARCHITECTURES.values()):
            problems.insert(0, f"config.json says {', '.join(named)}: is it that?")

    def read(self, name: str) -> np.ndarray:
        array = self._where[name].read()
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


def _stored(directory: Path, model: ModelConfig, problems: list[str]) -> dict[str, _Stored]:
    """The tensors of a directory under the names that `slots` and _FUSED give them; an unknown one
    keeps its own. transformers allows `model.` to be absent or twice, and a mixture's
    block_sparse_moe to be called mlp."""
    fused = [name.format(l=layer) for layer in range(model.layers) for name in _FUSED]
    known = {name: name for name in (*slots(model), _HEAD)}
    if model.moe:
        known = {_as_mlp(name): name for name in (*known, *fused)}
    found: dict[str, _Stored] = {}
    for name, file in _locate(directory, problems).items():
        sought = _as_mlp(name) if model.moe else name
        forms = (sought.removeprefix("model."), f"model.{sought}", sought)
        standard = next((known[form] for form in forms if form in known), name)
        if standard in found:
            problems.append(f"{standard} twice, as {found[standard].name} and as {name}")
        found[standard] = _Stored(file, name)
    return found


def _as_mlp(name: str) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")


def _has_own_head(directory: Path, model: ModelConfig) -> bool:
    """Whether a directory that says tie_word_embeddings holds a head with values of its own."""
    try:
        stored = _stored(directory, model, [])
    except UserError:
        return False  # told where the weights are read
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    return head is not None and embedding is not None and not _are_equal(head, embedding)


def _are_equal(a: _Stored, b: _Stored) -> bool:
    """As float32, a few rows in memory at a time."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= set(READABLE):
        return a.shape == b.shape and a.dtype == b.dtype
    if not a.shape:
        return np.array_equal(a.read(), b.read())
    for start in range(0, a.shape[0], 1024):
        rows = (start, min(start + 1024, a.shape[0]))
        x, y = (tensor._replace(rows=rows).read().astype(np.float32) for tensor in (a, b))
        if not np.array_equal(x, y):
            return False
    return True


def _locate(directory: Path, problems: list[str]) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it. As transformers looks for them: in the file that
    config.json names, else in model.safetensors, else in all files that the index names."""
    weights = _weights(directory)
    if not weights.name.endswith(".index.json"):
        file = SafetensorsFile(weights)
        return dict.fromkeys(file.tensors, file)
    try:
        weight_map = json.loads(weights.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
        if not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map must map tensors to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{weights}: damaged: {error}") from error
    located: dict[str, SafetensorsFile] = {}
    for name in sorted(names):
        if not _is_inside(name):
            raise UserError(
                f"{weights}: {name!r} is no file of this directory; refusing to read it"
            )
        if not (directory / name).is_file():
            problems.append(f"missing shard {name}")
            continue
        file = SafetensorsFile(directory / name)
        for tensor in file.tensors:
            if tensor in located and not _are_equal(
                _Stored(located[tensor], tensor), _Stored(file, tensor)
            ):
                problems.append(
                    f"{tensor} in two shards with other values, {located[tensor].path.name} and"
                    f" {name}"
                )
            located[tensor] = file
    return located


def _weights(directory: Path) -> Path:
    """The file or index to read. Raises UserError when there is none that can be read."""
    named = _read_json(directory / "config.json").get("transformers_weights")
    if named is not None:
        if not (isinstance(named, str) and _is_inside(named) and (directory / named).is_file()):
            raise UserError(f"{directory}: transformers_weights={named!r} is no file of it")
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"{directory}: transformers_weights={named!r} is no safetensors file")
        return directory / named
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        if index.is_file() and SINGLE not in index.read_text("utf-8", "replace"):
            log.warning(
                "%s holds both %s and %s, which does not name it; the former is read, as"
                " transformers does: delete the one that is out of date",
                directory,
                SINGLE,
                INDEX,
            )
        return single
    if index.is_file():
        return index
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    )
    if pickles:
        raise UserError(
            f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read; save"
            " the model as safetensors (transformers: model.save_pretrained(DIR))"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"; found {', '.join(others[:3])}: rename it, or write its index" if others else ""
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}{found}")


def _is_inside(name: str) -> bool:
    """Whether the file that an index names lies in its directory or below."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or name in ("", ".") or "\\" in name)


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
        metadata: Mapping[str, str] | None = None,
    ):
        if model.moe:
            experts_per_token(model)
        self.model, self._directory = model, directory
        self._dtypes = dtypes
        shapes = {name: (slots(model)[name].shape, dtype) for name, dtype in dtypes.items()}
        self._shards = ShardWriter(directory, shapes, shard_bytes, metadata)
        if (version := needed_transformers(model)) >= "5":
            log.warning(
                "a Mixtral with RoPE scaling needs transformers %s or newer; older ones refuse it,"
                " because some would leave the scaling out without a word",
                version,
            )

    def write(self, name: str, tensor: np.ndarray) -> None:
        self._shards.write(name, tensor)

    @property
    def sha256(self) -> dict[str, str]:
        """Of the files of tensors that are finished."""
        return self._shards.sha256

    def finish(self, kept: Mapping[str, Any], bos: int | None, eos: int | None, card: str) -> None:
        """config.json, generation_config.json and the model card; the tokenizer is the caller's.

        kept: CheckpointMetadata.huggingface. bos, eos: the tokenizer's, for a model that was born here.
        """
        self._shards.finish()
        usual = Counter(self._dtypes.values()).most_common(1)[0][0].name
        ids = {"bos_token_id": bos, "eos_token_id": eos}
        config = config_from_model(self.model, usual, kept.get("config", ids))
        self._write_json("config.json", config)
        generation = self._directory / "generation_config.json"
        there = _read_json(generation) if generation.is_file() else {}  # came with the tokenizer
        born_here = {} if kept or there else {"_from_model_config": True} | ids
        wanted = kept.get("generation_config") or born_here
        if wanted and wanted != there:
            self._write_json(generation.name, wanted)
        needs = f"\nNeeds transformers {needed_transformers(self.model)} or newer.\n"
        (self._directory / "README.md").write_text(card + needs, encoding="utf-8")

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        (self._directory / name).write_text(text, encoding="utf-8")
