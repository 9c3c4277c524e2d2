"""LoRA experts in btx_jax's own file format; for peft's files see `peft`. No base model is read
here.

A directory holds adapter.safetensors, with `layers.LAYER.TARGET.a` [experts, rank, inputs], `.b`
[experts, outputs, rank] and `.router` [experts, inputs] (layouts as in Hugging Face, float32), and
adapter.json: format number, model with its lora section (allocation, rank, k, alpha, targets),
number of experts per layer, path and digest of the base, training history, sha256 of
adapter.safetensors, and sha256 of all these except the base's path, which may be changed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors import SafetensorError
from safetensors.numpy import load, save

from btx_jax.architectures.modules import PARTS, adapted
from btx_jax.architectures.tensors import TensorId
from btx_jax.architectures.values import is_finite
from btx_jax.checkpoints.checksums import SEAL, sealed, unsealed
from btx_jax.checkpoints.problems import raise_problems
from btx_jax.checkpoints.safetensors_files import require_regular
from btx_jax.checkpoints.training_state import (
    UNSEALED,
    CheckpointMetadata,
    metadata_from_json,
    metadata_to_json,
)
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.models.llama import abstract_params
from btx_jax.models.lora import is_adapter, partition

TENSORS, ABOUT = "adapter.safetensors", "adapter.json"


def block_of(target: str) -> str:
    return PARTS[target].split("/")[0]


def places(model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield (name in files, leaf path, index of the layer in its run) for every tensor of the
    model's adapters."""
    layer = 0
    for run, length, spec in model.runs():
        for offset in range(length):
            for target in spec.lora.targets if spec.lora else ():
                assert spec.lora
                for part in ("a", "b", "router") if spec.lora.has_router else ("a", "b"):
                    yield (
                        f"layers.{layer}.{target}.{part}",
                        (run, block_of(target), "lora", target, part),
                        offset,
                    )
            layer += 1


def leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def to_tensors(model: ModelConfig, adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert an adapter's tree to tensors as stored in files."""
    host: dict[tuple[str, ...], np.ndarray] = {}
    result = {}
    for name, path, offset in places(model):
        if path not in host:
            host[path] = np.asarray(leaf(adapter, path))
        result[name] = np.ascontiguousarray(
            _turned(host[path][offset], path[-1]).astype(np.float32)
        )
    return result


def _turned(x: np.ndarray, part: str) -> np.ndarray:
    """Convert a tensor from the layout of parameters to that of files. For `a`, [I, E, R] ->
    [E, R, I], this is not its own inverse; see `_ours`."""
    return {
        "a": lambda: x.transpose(1, 2, 0),
        "b": lambda: x.swapaxes(1, 2),
        "router": lambda: x.T,
    }[part]()


def _ours(x: np.ndarray, part: str) -> np.ndarray:
    return {
        "a": lambda: x.transpose(2, 0, 1),
        "b": lambda: x.swapaxes(1, 2),
        "router": lambda: x.T,
    }[part]()


def from_tensors(
    model: ModelConfig, tensors: Mapping[str, np.ndarray], where: Path
) -> dict[str, Any]:
    """The adapter's tree, numpy float32. Raises UserError listing every tensor that is missing,
    unknown, misshapen or not finite."""
    shapes = partition(nn.unbox(abstract_params(model)), is_adapter)[0]
    tree: dict[str, Any] = {}
    problems, known = [], set()
    for name, path, offset in places(model):
        known.add(name)
        want = leaf(shapes, path).shape
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        array = (
            _ours(tensors[name], path[-1]) if tensors[name].ndim == len(want) - 1 else tensors[name]
        )
        if array.shape != want[1:]:
            problems.append(
                f"{name} is {tensors[name].shape}, not"
                f" {_turned(np.zeros(want[1:], bool), path[-1]).shape}"
            )
        elif not is_finite(array):
            problems.append(f"NaN or infinity in {name}")
        else:
            at = tree
            for key in path[:-1]:
                at = at.setdefault(key, {})
            at.setdefault(path[-1], np.zeros(want, np.float32))[offset] = array
    problems += [f"unknown {name}" for name in tensors if name not in known]
    raise_problems(where, problems)
    return tree


def is_adapter_directory(path: Path) -> bool:
    return (path / ABOUT).is_file()


def _read_json(directory: Path) -> dict[str, Any]:
    """Read adapter.json and verify its checksum."""
    file = directory / ABOUT
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if SEAL in values or values.get("format") != UNSEALED:
            unsealed(_without_place(values))
        return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "base": {**values["base"], "path": ""}}


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged ({what}): download or export it again")


def read_metadata(directory: Path) -> CheckpointMetadata:
    file, values = directory / ABOUT, _read_json(directory)
    try:
        metadata = metadata_from_json(values, file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if metadata.base is None or metadata.model.lora is None:
        raise UserError(f"{file}: has no base or no LoRA experts; export the adapter again")
    return metadata


def read_directory(directory: Path, model: ModelConfig) -> dict[str, Any]:
    """The tree of an adapter directory, numpy float32."""
    known = _read_json(directory).get("tensors_sha256")
    return from_tensors(model, load_tensors(directory / TENSORS, known), directory)


def load_tensors(file: Path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, sorted by name. Raises UserError when it cannot be read or
    its sha256 differs."""
    require_regular(file)
    try:
        data = file.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise _damaged(file, "checksum")
        return dict(sorted(load(data).items()))
    except (OSError, SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def write_directory(
    directory: Path, metadata: CheckpointMetadata, tensors: Mapping[str, np.ndarray]
) -> None:
    """Write an adapter into an existing directory."""
    data = save(dict(tensors), metadata={"format": "btx_jax"})
    (directory / TENSORS).write_bytes(data)
    assert metadata.model.lora
    experts = [
        spec.experts if spec else 0 for spec in metadata.model.lora.specs(metadata.model.layers)
    ]
    values = metadata_to_json(metadata) | {
        "experts": experts,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    values[SEAL] = sealed(_without_place(values))[SEAL]
    (directory / ABOUT).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def merged_delta(
    model: ModelConfig, tensors: Mapping[str, np.ndarray], gates: Callable[[int], np.ndarray]
) -> dict[TensorId, np.ndarray]:
    """{tensor: addition to that weight [out, in], float32}: (alpha / rank) sum g_i B_i A_i. gates:
    number of experts in a layer -> their fixed weights."""
    specs = [spec.lora for spec in model.layer_specs()]
    deltas = {}
    for name in (name for name in tensors if name.endswith(".a")):
        _, layer, target, _ = name.split(".")
        spec = specs[int(layer)]
        assert spec
        a_ERI, b_EOR = tensors[name], tensors[f"layers.{layer}.{target}.b"]
        if not b_EOR.any():  # an unadapted map stays bit-identical
            continue
        weight_E = gates(spec.experts).astype(np.float32) * np.float32(spec.scale)
        deltas[adapted(target, int(layer))] = (
            (b_EOR[0] @ a_ERI[0]) * weight_E[0]  # bit-identical to peft's merge
            if spec.experts == 1
            else np.einsum("e,eor,eri->oi", weight_E, b_EOR, a_ERI, optimize=True)
        )
    return deltas
