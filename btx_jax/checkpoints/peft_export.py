"""Write a single-expert LoRA in Hugging Face peft's format, on the modules of a family. Maps that
are zero are left out."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from btx_jax import hub_names
from btx_jax.architectures.modules import adapted, modules
from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.peft_config import CONFIG, TENSORS, family_of
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError


def write(
    directory: Path,
    model: ModelConfig,
    ours: Mapping[str, np.ndarray],
    base: str,
    origin: str,
) -> None:
    """Write into an existing directory. base, origin: the base's path and model_type, "" for a
    model created here. Raises UserError for several experts, a gate, or a LoRA of zeros, and where
    Hugging Face has no model like the base."""
    assert model.lora
    specs = model.lora.specs(model.layers)
    if any(spec and spec.has_router for spec in specs):
        raise UserError(
            "peft only supports LoRA with one expert and no gate; merge this adapter, or"
            " export it in btx_jax's format"
        )
    bare = model.base()
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, (layer, targets) in modules(family_of(bare, origin), bare).items():
        spec = specs[layer]
        if spec is None:
            continue
        outputs = {target: slots(bare)[adapted(target, layer)].shape[0] for target in targets}
        pieces = {
            target: _without_zeros(*(ours[f"layers.{layer}.{target}.{x}"][0] for x in "ab"))
            for target in targets
            if target in spec.targets
        }
        a, b = _joined(pieces, outputs)
        if not len(a):
            continue
        ranks[module], alphas[module] = len(a), model.lora.alpha * len(a) / spec.rank
        name = f"base_model.model.{module}.lora_"
        tensors[f"{name}A.weight"], tensors[f"{name}B.weight"] = a, b
    if not tensors:
        raise UserError(
            "all maps of this adapter are zero, so there is no LoRA to write; train it first"
        )
    (directory / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    on_hub = hub_names.origin(base)
    usual_rank = Counter(ranks.values()).most_common(1)[0][0]
    usual_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repo if on_hub else base,
        "revision": on_hub.revision if on_hub else None,
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != usual_rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != usual_alpha},
        "lora_dropout": model.lora.dropout,
        **_modules(list(ranks), model),
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _without_zeros(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B without trailing ranks that are zero."""
    rank = int(np.flatnonzero(a.any(1) | b.any(0)).max(initial=-1)) + 1
    return a[:rank], b[:, :rank]


def _joined(
    pieces: Mapping[str, tuple[np.ndarray, np.ndarray]], outputs: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module from those of its maps: the As are stacked, an A that several maps share
    only once; B has each map's values in its rows and the columns of its A. outputs: number of rows
    of each map of the module, in order."""
    places: dict[bytes, int] = {}
    rows_of_a: list[np.ndarray] = []
    at: dict[str, int] = {}
    rank = 0
    for target, (a, _) in pieces.items():
        if (key := a.tobytes()) not in places:
            places[key] = rank
            rows_of_a.append(a)
            rank += len(a)
        at[target] = places[key]
    inputs = next((a.shape[1] for a, _ in pieces.values()), 0)
    joined = np.zeros((sum(outputs.values()), rank), np.float32)
    start = 0
    for target, count in outputs.items():
        if target in pieces:
            b = pieces[target][1]
            joined[start : start + count, at[target] : at[target] + b.shape[1]] = b
        start += count
    return np.concatenate([np.zeros((0, inputs), np.float32), *rows_of_a]), joined


def _modules(names: list[str], model: ModelConfig) -> dict[str, Any]:
    """target_modules and layers_to_transform, abbreviated where every adapted layer has the same
    maps."""
    by_layer: dict[int, list[str]] = {}
    for name in names:
        _, _, layer, *module = name.split(".")
        by_layer.setdefault(int(layer), []).append(module[-1])
    same = next(iter(by_layer.values()))
    if any(modules != same for modules in by_layer.values()):
        return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    some = list(by_layer) if len(by_layer) < model.layers else None
    return {
        "target_modules": same,
        "layers_to_transform": some,
        "layers_pattern": "layers" if some else None,
    }
