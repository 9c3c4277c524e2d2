"""LoRA adapters in Hugging Face peft's format, on the modules of any family. No base model is read
here.

A LoRA that has been read must compute what peft 0.21 computes with the files; anything else is
refused, naming the setting. Layers here have one rank and one scale for all of their maps.
Unadapted maps among adapted ones are therefore filled with zeros, lower ranks are padded with
zeros, and differing scales are multiplied into B. Where a module holds several maps, each gets the
module's A and its own rows of B.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btx_jax.architectures.family import Family
from btx_jax.architectures.layout import Row, other_rows, rows
from btx_jax.architectures.modules import adapted, families_with, modules, modules_of_layer
from btx_jax.architectures.tensors import EMBEDDING, HEAD, slots
from btx_jax.architectures.values import is_finite
from btx_jax.checkpoints.adapter import from_tensors, load_tensors
from btx_jax.checkpoints.checksums import check_sums
from btx_jax.checkpoints.peft_config import (
    CONFIG,
    MERGE,
    PICKLE,
    REFUSED,
    TENSORS,
    family_of,
    others,
    read_config,
    short,
    targeted,
)
from btx_jax.checkpoints.problems import listed, raise_problems
from btx_jax.config.model_config import LORA_TARGETS, LoRAConfig, ModelConfig
from btx_jax.errors import ConfigError, UserError
from btx_jax.terminal import counted

_OF_TRAINING = ".lora_velora_embed"  # a buffer for VeLoRA's backward pass
_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.(.+))?\.weight")
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.default)?)(?=\.[^.]+$)")


class PeftLoRA(NamedTuple):
    """A LoRA read from peft. model: the base's config with the LoRA. tensors: as in a btx_jax
    adapter directory. carried: tensors of the base itself that the file also contains. notes:
    changes that were needed to make it fit."""

    model: ModelConfig
    tensors: dict[str, np.ndarray]
    carried: list[tuple[Row, np.ndarray]]
    notes: list[str]


class _Map(NamedTuple):
    """The LoRA of one map. alpha, rank: those of its module; alpha / rank is the scale."""

    module: str
    a: np.ndarray
    b: np.ndarray
    alpha: float
    rank: int

    def alpha_at(self, rank: int) -> float:
        """The alpha that gives the same scale at another rank."""
        return self.alpha * rank / self.rank


def read(directory: Path, base: ModelConfig, origin: str) -> PeftLoRA:
    """Read a LoRA saved by peft for a model like `base`. origin: the base's model_type, "" for a
    model created here. Raises UserError for settings that are not supported, and for tensors that
    do not fit the config or the model."""
    check_sums(directory)
    config = read_config(directory)
    where = directory / CONFIG
    family = family_of(base, origin)
    places = modules(family, base)
    held = load_tensors(_tensors_file(directory))
    _require_family(held, family, config, directory)
    wanted = targeted(config, family, list(places), where)
    known = _known_rows(family, base)
    factors: dict[str, dict[str, np.ndarray]] = {}
    carried: list[tuple[Row, np.ndarray]] = []
    problems: list[str] = []
    unknown: dict[str, list[str]] = {}
    for key, array in held.items():
        lora, name = _LORA.fullmatch(key), _WRAPPED.sub("", key).removeprefix(_PREFIX)
        if lora and lora[1] in places and lora[3] in (None, "default"):
            if lora[2] in factors.setdefault(lora[1], {}):
                problems.append(f"{key} given twice, with and without the adapter's name")
            factors[lora[1]][lora[2]] = array
        elif key.startswith(_PREFIX) and name in known:
            carried.append((known[name], array))
        elif not key.endswith(_OF_TRAINING):
            unknown.setdefault(_why(key, base), []).append(key)
    problems += [f"{reason}: {listed(keys)}" for reason, keys in unknown.items()]
    problems += [
        f"modules_to_save: {saved} is missing"
        for saved in config.get("modules_to_save") or ()
        if not any(f"{saved}." in row.name for row, _ in carried)
    ]
    if extra := [module for module in factors if module not in wanted]:
        problems.append(
            "target_modules, exclude_modules and layers_to_transform exclude modules that the"
            f" file has LoRA for: {listed(extra)}"
        )
    lacking = [module for module in wanted if module not in factors]
    if lacking and not problems:
        problems.append(f"target_modules names modules that the file lacks: {listed(lacking)}")
    for module, found in factors.items():
        shape = _shape(places[module], base)
        problems += _compare(module, found, wanted.get(module, (None, 0))[0], shape)
    raise_problems(directory, problems)
    if not factors:
        raise UserError(f"{directory}: holds no LoRA tensor")
    maps = {
        (places[module][0], target): _Map(module, a, b, wanted[module][1], wanted[module][0])
        for module, found in factors.items()
        for target, a, b in _cut(found, places[module], base)
    }
    model, tensors, notes = _fit(maps, config, base, where)
    from_tensors(model, tensors, directory)  # raises for misfits
    if says := config.get("base_model_name_or_path"):
        notes.append(f"its config names the base {short(says)}")
    if more := others(directory):
        notes.append(f"ignored: the adapters in {listed(more)}")
    return PeftLoRA(model, tensors, carried, notes)


def _require_family(
    keys: Mapping[str, Any], family: Family, config: Mapping[str, Any], directory: Path
) -> None:
    """Raise UserError for a LoRA on modules that only other families have."""
    own = modules_of_layer(family)
    found = [_LORA.fullmatch(key) for key in keys]
    inside = [re.fullmatch(r"model\.layers\.\d+\.(.+)", lora[1]) for lora in found if lora]
    names = dict.fromkeys(match[1] for match in inside if match)
    foreign = [name for name in names if name not in own and families_with([name])]
    if not foreign:
        return
    says = config.get("base_model_name_or_path")
    raise UserError(
        f"{directory}: a LoRA of another family: it is on {listed(foreign)}, as"
        f" {families_with(foreign)[0]} has them, and BASE is a"
        f" {family.model_class} with {', '.join(own)}; name the base that it was trained on"
        + (f" (its config says {short(says)})" if says else "")
    )


def _known_rows(family: Family, base: ModelConfig) -> dict[str, Row]:
    """{name: tensor of the base's files}; a tied head may be stored as well as the embedding."""
    known, filled = slots(base), family.filled(base)
    found = {
        row.name: row
        for row in (*other_rows(family, filled), *rows(family, filled))
        if all(tensor in known for parts in row.tensors for tensor in parts)
    }
    found.setdefault(str(HEAD), Row(str(HEAD), ((EMBEDDING,),), False))
    return found


def _tensors_file(directory: Path) -> Path:
    file = directory / TENSORS
    if not file.is_file() and (directory / PICKLE).is_file():
        raise UserError(
            f"{directory}: {PICKLE} is a pickle, which can run arbitrary code when loaded; save"
            " the adapter as safetensors (peft: model.save_pretrained(DIR))"
        )
    return file


def _shape(place: tuple[int, tuple[str, ...]], base: ModelConfig) -> tuple[int, int]:
    """(outputs, inputs) of a module."""
    layer, targets = place
    shapes = [slots(base)[adapted(target, layer)].shape for target in targets]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _compare(
    module: str, found: Mapping[str, np.ndarray], rank: int | None, shape: tuple[int, int]
) -> list[str]:
    """Problems of a module's tensors. rank: from the config. shape: the module's own."""
    problems = [f"missing {module}.lora_{factor}" for factor in "AB" if factor not in found]
    for factor, array in found.items():
        if array.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            problems.append(f"{module}.lora_{factor} is {array.dtype.name}, not floating point")
        elif array.ndim != 2:
            problems.append(f"{module}.lora_{factor} is {array.shape}, not a matrix")
        elif not is_finite(_float32(array)):
            problems.append(f"{module}.lora_{factor} holds NaN, infinity or values outside float32")
    if not problems and rank not in (None, len(found["A"])):
        problems.append(f"{module} has rank {len(found['A'])}, but r and rank_pattern say {rank}")
    if not problems and found["A"].shape[0] != found["B"].shape[1]:
        problems.append(f"{module}: A is {found['A'].shape}, B {found['B'].shape}")
    if not problems and (found["B"].shape[0], found["A"].shape[1]) != shape:
        problems.append(
            f"{module}: A is {found['A'].shape}, B {found['B'].shape}, and the base has a map of"
            f" {shape[1]} inputs and {shape[0]} outputs there"
        )
    return problems


def _float32(array: np.ndarray) -> np.ndarray:
    """The array in float32; values beyond its range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def _why(key: str, base: ModelConfig) -> str:
    """Why a tensor cannot be read, naming the setting that produces it."""
    lora, layer = _LORA.fullmatch(key), re.search(r"\blayers\.(\d+)\.", key)
    if not key.startswith("base_model.model."):
        return "names without base_model.model., which peft ignores; save it with peft"
    if key.startswith("base_model.model.layers."):
        return "from a model without a head (task_type), which peft ignores on one with a head"
    if layer and int(layer[1]) >= base.layers:
        return f"from a different model: the base has {base.layers} layers"
    if ".lora_embedding_" in key:
        return f"target_modules: LoRA on an embedding; {MERGE}"
    if "lora_magnitude_vector" in key:
        return f"use_dora: {MERGE}"
    if ".token_adapter." in key or "trainable_tokens" in key:
        return f"trainable_token_indices: {MERGE}"
    if key.endswith(".lora_B.bias"):
        return f"lora_bias: {REFUSED['lora_bias']}"
    if key.endswith(".bias"):
        return "bias: the base has none there"
    if lora and lora[3] not in (None, "default"):
        return f"saved under the adapter's name {lora[3]!r}, which peft ignores; save it with peft"
    if lora:
        return f"target_modules: LoRA on a module that cannot have it here; {MERGE}"
    return "unknown"


def _cut(
    found: Mapping[str, np.ndarray], place: tuple[int, tuple[str, ...]], base: ModelConfig
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (target, A, B) of the maps in a module. If there are several, ranks that only the
    others use are removed from each: this is how one module stores separate LoRAs."""
    layer, targets = place
    a, b = (found[factor].astype(np.float32) for factor in "AB")
    start = 0
    for target in targets:
        end = start + slots(base)[adapted(target, layer)].shape[0]
        own = b[start:end]
        start = end
        used = own.any(0) | ~b.any(0)
        if used.any():
            # Files are written in memory order, which indexing changes.
            yield target, a[used], np.ascontiguousarray(own[:, used])


def _fit(
    found: Mapping[tuple[int, str], _Map],
    config: Mapping[str, Any],
    base: ModelConfig,
    where: Path,
) -> tuple[ModelConfig, dict[str, np.ndarray], list[str]]:
    """Express {(layer, target): LoRA} with one rank and one scale per layer, computing the same
    function: (model, tensors, notes)."""
    largest: dict[int, int] = {}
    for (layer, _), its in found.items():
        largest[layer] = max(len(its.a), largest.get(layer, 0))
    # the alpha each map would need
    wanted = {place: its.alpha_at(largest[place[0]]) for place, its in found.items()}
    sizes = Counter(abs(alpha) for alpha in wanted.values() if alpha)
    if not sizes:
        raise UserError(f"{where}: lora_alpha=0: has no effect")
    alpha = sizes.most_common(1)[0][0]
    targets = tuple(t for t in LORA_TARGETS if t in {target for _, target in found})
    ranks = tuple(largest.get(layer, max(largest.values())) for layer in range(base.layers))
    try:
        lora = LoRAConfig(
            allocation=(
                ",".join(str(int(layer in largest)) for layer in range(base.layers))
                if base.layers > 1
                else "1"
            ),
            rank=ranks if len(set(ranks)) > 1 else ranks[:1],
            k=(1,),
            alpha=alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets,
        )
        model = ModelConfig(**{**vars(base), "lora": lora})
    except ConfigError as error:
        raise UserError(f"{where}: r, lora_alpha and use_rslora give {error}") from error

    shapes = {tensor: slot.shape for tensor, slot in slots(base).items()}
    tensors: dict[str, np.ndarray] = {}
    for layer in largest:
        for target in targets:
            outputs, inputs = shapes[adapted(target, layer)]
            one = found.get((layer, target))
            a = one.a if one else np.zeros((0, inputs), np.float32)
            b = one.b if one else np.zeros((outputs, 0), np.float32)
            factor = wanted.get((layer, target), alpha) / alpha
            if factor != 1:
                with np.errstate(over="ignore", invalid="ignore"):
                    b = _float32(b.astype(np.float64) * factor)
                if not is_finite(b):
                    assert one
                    raise UserError(
                        f"{where}: lora_alpha and alpha_pattern scale {one.module} beyond float32"
                    )
            more = largest[layer] - len(a)
            tensors[f"layers.{layer}.{target}.a"] = np.pad(a, ((0, more), (0, 0)))[None]
            tensors[f"layers.{layer}.{target}.b"] = np.pad(b, ((0, 0), (0, more)))[None]
    return model, tensors, _notes(found, largest, wanted, alpha, len(targets))


def _notes(
    found: Mapping[tuple[int, str], _Map],
    largest: Mapping[int, int],
    wanted: Mapping[tuple[int, str], float],
    alpha: float,
    targets: int,
) -> list[str]:
    notes = []
    if absent := len(largest) * targets - len(found):
        notes.append(f"{_maps(absent)} without LoRA in adapted layers: zeros")
    if padded := sum(len(one.a) < largest[layer] for (layer, _), one in found.items()):
        notes.append(f"{_maps(padded)} of lower rank than others in the layer: padded with zeros")
    folded = [x / alpha for x in wanted.values() if x != alpha]
    if folded:
        rounded = sum(abs(math.frexp(factor)[0]) not in (0, 0.5) for factor in folded)
        how = f", {rounded} rounded to float32 by it" if rounded else ", every bit kept"
        notes.append(f"{_maps(len(folded))} of another scale: taken into B{how}")
    return notes


def _maps(count: int) -> str:
    return counted(count, "map")
