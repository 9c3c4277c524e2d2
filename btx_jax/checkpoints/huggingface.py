"""Hugging Face checkpoint directories: read and write a model's tensors under the names, and in the
arrangement, that its family declares."""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from btx_jax.architectures.family import Family
from btx_jax.architectures.layout import Row, constants, other_rows, rows
from btx_jax.architectures.registry import family_for, known_families
from btx_jax.architectures.tensors import EMBEDDING, HEAD, Range, Region, TensorId, slots
from btx_jax.architectures.values import is_finite
from btx_jax.checkpoints.checksums import check_sums, read_sums
from btx_jax.checkpoints.huggingface_config import (
    class_names,
    config_from_model,
    family_of,
    kept_config,
    model_from_config,
    needed_transformers,
)
from btx_jax.checkpoints.problems import raise_problems
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

log = logging.getLogger(__name__)


_HEADLESS = (
    " (the base model was saved without its head: save what AutoModelForCausalLM loads; or, if"
    " the head is the embedding, set tie_word_embeddings in config.json)"
)
_BUFFER = re.compile(r"rotary_emb\.inv_freq")  # saved by early releases; can be computed


def is_huggingface(path: Path) -> bool:
    """Whether a path is a Hugging Face directory. btx_jax's runs have a config.json too, but with a
    stage, and without model_type."""
    if (path / "adapter_config.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    config = (path / "config.json").read_text("utf-8", "replace")
    is_run = '"stage"' in config or (path / "checkpoints").is_dir()
    return '"model_type"' in config or not is_run


def read_config(directory: Path) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json. The weights only decide whether
    a head declared as tied really is. Raises UserError."""
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory} is a LoRA adapter, not a model; merge it into its base first (peft:"
            " merge_and_unload)"
        )
    path = directory / "config.json"
    config = _read_json(path)
    try:
        model = model_from_config(config, str(path))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a value of the wrong kind: {type(error).__name__}: {error}"
        ) from error
    if model.tied_head and _has_own_head(directory, model):
        log.warning(
            "%s: tie_word_embeddings is set, but lm_head.weight differs from the embedding;"
            " both are kept, as in transformers",
            path,
        )
        return dataclasses.replace(model, tied_head=False)
    return model


def read_kept(directory: Path) -> dict[str, Any]:
    """Read what a Hugging Face directory contains beyond its model, for
    `CheckpointMetadata.huggingface`: from config.json, and all of generation_config.json ({}
    without one). Raises UserError."""
    generation = directory / "generation_config.json"
    config = _read_json(directory / "config.json")
    return {
        "model_type": family_of(config, str(directory / "config.json")).model_type,
        "config": kept_config(config),
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
    """A tensor in a file, or a part: one expert's tensor, or some of its rows."""

    file: SafetensorsFile
    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def dtype(self) -> str:
        return self.file.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.file.tensors[self.name].shape

    def read(self, rows: Range | None = None, columns: Range | None = None) -> np.ndarray:
        """The tensor in its stored dtype, or in float32 if that dtype is not one of DTYPES. rows,
        columns: of the part."""
        if rows is not None and self.rows is not None:
            rows = (self.rows[0] + rows[0], self.rows[0] + rows[1])
        array = self.file.read(self.name, self.expert, rows or self.rows, columns)
        if array.dtype in DTYPES.values():
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32)


class HuggingFaceReader:
    """Reads the tensors of a directory. Everything but their values is checked on opening. model:
    the result of `read_config`, if already known.

    Raises UserError that lists all unknown, missing, duplicate, misshapen or mistyped tensors.
    `read` records NaN and infinity for `check`.
    """

    def __init__(self, directory: Path, model: ModelConfig | None = None):
        self.directory = directory
        self.model = model or read_config(directory)
        self.slots = slots(self.model)
        self._config = _read_json(directory / "config.json")
        self._family = family_of(self._config, str(directory / "config.json"))
        problems: list[str] = []
        stored = _stored(directory, self._family, self.model, problems)
        self._where: dict[TensorId, _Stored] = {}
        self._used: set[str] = set()
        for row in rows(self._family, self.model) + other_rows(self._family, self.model):
            if row.name in stored:
                self._take(row, stored[row.name], problems)
        if self.model.tied_head and EMBEDDING not in self._where and str(HEAD) in stored:
            self._where[EMBEDDING] = stored[str(HEAD)]
        for name, wanted in constants(self._family, self.model).items():
            if name in stored:
                self._used.add(name)
                problems += _unlike(stored[name], wanted)
            else:
                problems.append(f"missing {name}")
        self._compare(stored, problems)
        if problems:  # a damaged header may be their cause: report damage first
            files = [name for name in read_sums(directory) if name.endswith(".safetensors")]
            check_sums(directory, files)
        raise_problems(directory, problems)
        self.dtypes = {
            tensor: DTYPES.get(self._where[tensor].dtype, np.dtype(np.float32))
            for tensor in self.slots
        }
        rounded = [tensor for tensor in self.slots if self._where[tensor].dtype == "F64"]
        if rounded:
            log.warning("%s: float64 is rounded to float32, %d tensors", directory, len(rounded))
        self._bad_values: list[str] = []

    def _take(self, row: Row, found: _Stored, problems: list[str]) -> None:
        """Register the model's tensors that one tensor of a file contains."""
        self._used.add(row.name)
        if found.dtype not in READABLE:
            problems.append(
                f"{found.name} is {found.dtype}, not one of {', '.join(READABLE)}: such weights are"
                " not supported"
            )
        elif found.shape != (shape := row.shape(self.model)):
            problems.append(f"{found.name} is {found.shape}, not {shape}")
        for number, parts in enumerate(row.tensors):
            start = 0
            for tensor in parts:
                end = start + self.slots[tensor].shape[0]
                if tensor in self._where:
                    other = self._where[tensor].name
                    problems.append(f"{tensor} given twice, by {other} and {found.name}")
                self._where[tensor] = _Stored(
                    found.file,
                    found.name,
                    number if row.stacked else None,
                    (start, end) if len(parts) > 1 else None,
                )
                start = end

    def _compare(self, stored: Mapping[str, _Stored], problems: list[str]) -> None:
        for name, tensor in stored.items():
            is_copy = name == str(HEAD) and self.model.tied_head  # verified by read_config
            if not (name in self._used or is_copy or _BUFFER.search(name)):
                problems.append(f"unknown {tensor.name}")
        for row in rows(self._family, self.model):
            missing = [t for parts in row.tensors for t in parts if t not in self._where]
            if missing:
                problems.append(f"missing {row.name}{_HEADLESS if HEAD in missing else ''}")
        named = class_names(self._config)
        classes = {family.model_class for family in known_families().values()}
        if problems and not set(named) <= classes:
            problems.insert(0, f"config.json says {', '.join(named)}; check that")

    def read(self, tensor: TensorId) -> np.ndarray:
        array = self._seen(tensor, self._where[tensor].read())
        array.flags.writeable = False
        return array

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        def read(rows: Range, columns: Range | None) -> np.ndarray:
            return self._seen(tensor, self._where[tensor].read(rows, columns))

        return self.slots[tensor].region_to_ours(region, read)

    def _seen(self, tensor: TensorId, array: np.ndarray) -> np.ndarray:
        if not is_finite(array):
            self._bad_values.append(self._where[tensor].name)
        return array

    def check(self) -> None:
        """Raise UserError when a tensor that was read contained NaN or infinity."""
        raise_problems(
            self.directory,
            [f"NaN or infinity in {name}" for name in dict.fromkeys(self._bad_values)],
        )


def _unlike(found: _Stored, wanted: np.ndarray) -> list[str]:
    """Problems of a tensor that must be constant: none or one."""
    if found.dtype not in READABLE or found.shape != wanted.shape:
        return [f"{found.name} is {found.dtype} {found.shape}, not {wanted.shape}"]
    array = found.read()
    held = wanted.astype(array.dtype).astype(np.float32)
    if np.allclose(array.astype(np.float32), held, rtol=2**-8, atol=0):  # bfloat16's rounding
        return []
    return [f"{found.name} is not {wanted.flat[0]:g} everywhere: such a layer is not supported"]


def _stored(
    directory: Path, family: Family, model: ModelConfig, problems: list[str]
) -> dict[str, _Stored]:
    """The tensors of a directory under the names that the family declares; unknown ones keep their
    names. As in transformers, `model.` may be missing or doubled."""
    known = {row.name for row in rows(family, model) + other_rows(family, model)}
    known |= {str(HEAD), *constants(family, model)}
    found: dict[str, _Stored] = {}
    for name, file in _locate(directory, problems).items():
        forms = (name, name.removeprefix("model."), f"model.{name}")
        standard = next((form for form in forms if form in known), name)
        if standard in found:
            problems.append(f"{standard} twice, as {found[standard].name} and as {name}")
        found[standard] = _Stored(file, name)
    return found


def _has_own_head(directory: Path, model: ModelConfig) -> bool:
    """Whether a directory with tie_word_embeddings nevertheless contains a head with other
    values."""
    try:
        family = family_of(_read_json(directory / "config.json"), str(directory))
        stored = _stored(directory, family, model, [])
    except UserError:
        return False  # reported when the weights are read
    head, embedding = (stored.get(str(tensor)) for tensor in (HEAD, EMBEDDING))
    return head is not None and embedding is not None and not _are_equal(head, embedding)


def _are_equal(a: _Stored, b: _Stored) -> bool:
    """Whether two tensors are equal as float32, comparing a few rows at a time."""
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
    """Tensor name -> the file that contains it. As in transformers: the file named by config.json,
    else model.safetensors, else all files listed by the index."""
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
                f"{weights}: {name!r} is not a file of this directory; refusing to read it"
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
                    f"{tensor} in two shards with different values, {located[tensor].path.name}"
                    f" and {name}"
                )
            located[tensor] = file
    return located


def _weights(directory: Path) -> Path:
    """The file or index to read. Raises UserError when there is none that can be read."""
    named = _read_json(directory / "config.json").get("transformers_weights")
    if named is not None:
        if not (isinstance(named, str) and _is_inside(named) and (directory / named).is_file()):
            raise UserError(f"{directory}: transformers_weights={named!r} is not one of its files")
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"{directory}: transformers_weights={named!r} is not a safetensors file"
            )
        return directory / named
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        if index.is_file() and SINGLE not in index.read_text("utf-8", "replace"):
            log.warning(
                "%s holds both %s and %s, which does not list it; the former is read, as in"
                " transformers: delete the outdated one",
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
            f"{directory}: {pickles[0]} is a pickle, which can run arbitrary code when loaded;"
            " save the model as safetensors (transformers: model.save_pretrained(DIR))"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"; found {', '.join(others[:3])}; rename it, or write its index" if others else ""
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}{found}")


def _is_inside(name: str) -> bool:
    """Whether a file listed by an index is in its directory or below."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or name in ("", ".") or "\\" in name)


class HuggingFaceWriter:
    """Writes a model into a directory, tensor by tensor; `finish` adds the small files.

    model, family: as returned by `written_as`, so that model includes the zeros that the family
    requires. dtypes: of each tensor, in the order in which they will be written. Raises UserError
    when tensors that the family stores as one differ in dtype.
    """

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        family: Family,
        dtypes: Mapping[TensorId, np.dtype],
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ):
        self.model, self._directory, self._family = model, directory, family
        self._dtypes = dtypes
        self._row_of = {
            t: row for row in rows(family, model) for parts in row.tensors for t in parts
        }
        self._waiting: dict[str, dict[TensorId, np.ndarray]] = {}
        missing = {row.name: sum(map(len, row.tensors)) for row in rows(family, model)}
        files: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for tensor, dtype in dtypes.items():
            row = self._row_of[tensor]
            if dtype != dtypes[first := row.tensors[0][0]]:
                raise UserError(
                    f"{tensor} is {dtype} but {first} is {dtypes[first]}, and a"
                    f" {family.model_class} keeps both in {row.name}; choose one dtype for all"
                )
            missing[row.name] -= 1
            if not missing[row.name]:
                files[row.name] = (row.shape(model), dtype)
        self._constants = constants(family, model)
        files |= {name: (array.shape, array.dtype) for name, array in self._constants.items()}
        self._shards = ShardWriter(directory, files, shard_bytes, metadata)
        if family.scaling_since and needed_transformers(model, family) == family.scaling_since:
            log.warning(
                "a %s with RoPE scaling needs transformers %s or newer; older versions are"
                " refused, as some would silently ignore the scaling",
                family.model_class,
                family.scaling_since,
            )

    def write(self, tensor: TensorId, array: np.ndarray) -> None:
        """Write a tensor. Tensors that share one tensor of a file are written with the last of
        them."""
        row = self._row_of[tensor]
        waiting = self._waiting.setdefault(row.name, {})
        waiting[tensor] = array
        if len(waiting) < sum(map(len, row.tensors)):
            return
        del self._waiting[row.name]
        self._shards.write(row.name, row.joined(waiting.__getitem__))

    @property
    def sha256(self) -> dict[str, str]:
        """sha256 of each finished tensor file, by name."""
        return self._shards.sha256

    def finish(self, kept: Mapping[str, Any], bos: int | None, eos: int | None, card: str) -> None:
        """Write config.json, generation_config.json and the model card; the caller writes the
        tokenizer. kept: CheckpointMetadata.huggingface. bos, eos: the tokenizer's ids, for a model
        created here."""
        for name, array in self._constants.items():
            self._shards.write(name, array)
        self._shards.finish()
        usual = Counter(self._dtypes.values()).most_common(1)[0][0].name
        ids = {"bos_token_id": bos, "eos_token_id": eos}
        config = config_from_model(self.model, self._family, usual, kept.get("config", ids))
        self._write_json("config.json", config)
        generation = self._directory / "generation_config.json"
        there = _read_json(generation) if generation.is_file() else {}  # copied with the tokenizer
        born_here = {} if "config" in kept or there else {"_from_model_config": True} | ids
        wanted = kept.get("generation_config") or born_here
        if wanted and wanted != there:
            self._write_json(generation.name, wanted)
        needed = needed_transformers(self.model, self._family)
        needs = (
            f"Needs transformers {needed} or newer."
            if needed
            else f"{self._family.model_class} is not part of transformers: it is loaded from its"
            " own code (trust_remote_code)."
        )
        (self._directory / "README.md").write_text(f"{card}\n{needs}\n", encoding="utf-8")

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        (self._directory / name).write_text(text, encoding="utf-8")


def written_as(model: ModelConfig, kept: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """(the family to write a model as, the model with the zeros that the family requires). kept:
    CheckpointMetadata.huggingface. Raises UserError when Hugging Face has no such model."""
    family = family_for(model, kept.get("model_type", ""))
    return family, family.filled(model)
