"""Files of Hugging Face's peft: a LoRA as `save_pretrained` writes it, in and out. No base model is
read here.

What is read must compute here what peft 0.21 computes with it, or is refused with the setting's
name. A layer here has one rank and one scale for all of its maps, so a map without LoRA among
adapted ones holds zeros, a lower rank is padded with zeros, and a scale of its own goes into B.
Writing leaves zeros out again.
"""

import contextlib
import functools
import json
import math
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from btx_jax.checkpoints.adapter import MODULES, from_tensors, load_tensors
from btx_jax.checkpoints.checksums import check_sums
from btx_jax.checkpoints.huggingface import SHOWN, is_finite, raise_problems, slots
from btx_jax.config.model_config import LORA_TARGETS, LoRAConfig, ModelConfig
from btx_jax.errors import ConfigError, UserError

TENSORS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MERGE = (
    "merge it with peft (model.merge_and_unload().save_pretrained(DIR)) and take the whole model"
)
_TARGET_OF = {module: target for target, module in MODULES.items()}
_DEFAULT_MODULES = ("q_proj", "v_proj")  # peft's own for Llama, Mistral and Mixtral
# Settings of LoraConfig that change what a LoRA computes, and what to do about each.
_REFUSED = dict.fromkeys(
    (
        "kasa_config", "layer_replication", "monteclora_config", "target_parameters",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    ),
    MERGE,
) | {
    "alora_invocation_tokens": "it acts behind certain tokens only; train one without",
    "arrow_config": "it routes between other LoRAs; import those one by one",
    "lora_bias": "no map has a bias here; train one with lora_bias=False",
}  # fmt: skip
# Settings that are of training, of other kinds of models, or seen in the tensors themselves.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "init_lora_weights",
}  # fmt: skip
_INITIALISATIONS_OF_LORA_ALONE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_PATTERNS, _LENGTH = 1000, 10_000  # of one setting: how many, and characters of each
_SECONDS = 10  # for matching all of them: a regular expression may take years
_TOO_LONG = f"takes too long to match (all together may take {_SECONDS} s): simplify it"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_OF_TRAINING = ".lora_velora_embed"  # a buffer for VeLoRA's backward pass
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.(.+))?\.weight")
_BASE_TENSOR = re.compile(
    r"base_model\.model\.(.+?)"
    r"(?:\.base_layer|\.original_module|\.modules_to_save(?:\.default)?)?\.weight"
)


class PeftLoRA(NamedTuple):
    """model: the base's with the LoRA. tensors: as in an adapter directory of ours. carried:
    tensors of the base itself that the file holds beside the LoRA, by their Hugging Face names.
    notes: what was done so that it fits here."""

    model: ModelConfig
    tensors: dict[str, np.ndarray]
    carried: list[tuple[str, np.ndarray]]
    notes: list[str]


def read(directory: Path, base: ModelConfig) -> PeftLoRA:
    """A LoRA saved by peft, for a model like `base`.

    Raises UserError for what LoRA here does not have, naming the setting, and for tensors that do
    not fit the config or the model.
    """
    check_sums(directory)
    config = _read_config(directory)
    where = directory / CONFIG
    modules = {
        f"model.layers.{layer}.{MODULES[target]}": (layer, target)
        for layer, spec in enumerate(base.layer_specs())
        for target in LORA_TARGETS
        if not spec.experts or target in ("q", "k", "v", "o")
    }
    targeted = _targeted(config, list(modules), where)
    factors: dict[str, dict[str, np.ndarray]] = {}
    carried: list[tuple[str, np.ndarray]] = []
    problems: list[str] = []
    unknown: dict[str, list[str]] = {}
    known = slots(base)
    for key, array in sorted(load_tensors(_tensors_file(directory)).items()):
        lora, tensor = _LORA.fullmatch(key), _BASE_TENSOR.fullmatch(key)
        if lora and lora[1] in modules and lora[3] in (None, "default"):
            if lora[2] in factors.setdefault(lora[1], {}):
                problems.append(f"{key} twice, with and without the adapter's name")
            factors[lora[1]][lora[2]] = array
        elif tensor and (f"{tensor[1]}.weight" in known or tensor[1] == "lm_head"):
            carried.append((f"{tensor[1]}.weight", array))
        elif not key.endswith(_OF_TRAINING):
            unknown.setdefault(_why(key, base), []).append(key)
    problems += [f"{reason}: {listed(keys)}" for reason, keys in unknown.items()]
    problems += [
        f"modules_to_save: {name} is missing"
        for name in config.get("modules_to_save") or ()
        if not any(f"{name}." in tensor for tensor, _ in carried)
    ]
    if extra := [module for module in factors if module not in targeted]:
        problems.append(
            "target_modules, exclude_modules and layers_to_transform leave out what the file holds"
            f" LoRA for: {listed(extra)}"
        )
    lacking = [module for module in targeted if module not in factors]
    if lacking and not problems:
        problems.append(f"target_modules names what the file lacks: {listed(lacking)}")
    for module, found in factors.items():
        problems += _compare(module, found, targeted.get(module, (None, 0))[0])
    raise_problems(directory, problems)
    if not factors:
        raise UserError(f"{directory}: holds no LoRA tensor")
    by_place = {modules[name]: (factors[name], targeted[name]) for name in factors}
    model, tensors, notes = _fit(by_place, config, base, where)
    from_tensors(model, tensors, directory)  # raises for what does not fit
    if name := config.get("base_model_name_or_path"):
        notes.append(f"its config names the base {_short(name)}")
    if others := _others(directory):
        notes.append(f"left alone: the adapters in {listed(others)}")
    return PeftLoRA(model, tensors, carried, notes)


def _others(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))


def _read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, its settings known to be expressible one by one."""
    file = directory / CONFIG
    if not file.is_file() and (others := _others(directory)):
        raise UserError(f"{directory}: holds adapters in folders; name one: {listed(others)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: no config of a peft LoRA: {type(error).__name__}: {error}"
        ) from error
    if kind != "LORA":
        raise UserError(f"{file}: peft_type {kind!r}; only LORA can be imported; {MERGE}")
    problems = [
        f"{key}={_short(config[key])}: LoRA here has nothing like it; {cure}"
        for key, cure in _REFUSED.items()
        if config.get(key) not in (None, False, {}, [])
    ]
    how = config.get("init_lora_weights")
    if (how.lower() if isinstance(how, str) else how) not in _INITIALISATIONS_OF_LORA_ALONE:
        problems.append(
            f"init_lora_weights={_short(how)}: changed the base itself; save it with"
            f" path_initial_model_for_weight_conversion, or {MERGE}"
        )
    problems += [
        f"{key}={_short(value)}: not a setting of peft 0.21 (this was written by"
        f" {config.get('peft_version')}); if it changes nothing, delete it there, else {MERGE}"
        for key, value in config.items()
        if key not in {*_READ, *_WITHOUT_EFFECT, *_REFUSED} and value not in (None, False, {}, [])
    ]
    for key in ("r", "lora_alpha"):
        problems += _wrong_number(key, config.get(key))
    for key, of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key}={_short(pattern)}: must map names to numbers")
            continue
        for name, value in pattern.items():
            problems += [
                f"{key}: {_short(name)[1:-1]}: {line}" for line in _wrong_number(of, value)
            ]
        problems += _too_much(key, list(pattern))
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(
            f"lora_dropout={_short(dropout)}: must lie in [0, 1); it acts in training only"
        )
    for key in _NAMES:
        value = config.get(key)
        names = [value] if isinstance(value, str) else value
        if isinstance(value, str) and key == "modules_to_save":
            problems.append(f"{key}={_short(value)}: must be a list of names")
        elif isinstance(names, list) and all(isinstance(name, str) for name in names):
            problems += _too_much(key, names)
        elif value is not None:
            problems.append(f"{key}={_short(value)}: must be names")
    some = config.get("layers_to_transform")
    if some is not None and not all(
        type(layer) is int for layer in (some if isinstance(some, list) else [some])
    ):
        problems.append(f"layers_to_transform={_short(some)}: must be layers' numbers")
    raise_problems(file, problems)
    return config


def _too_much(key: str, patterns: Sequence[str]) -> list[str]:
    if len(patterns) > _PATTERNS:
        return [f"{key}: {len(patterns)} patterns; at most {_PATTERNS} are read"]
    longest = max(map(len, patterns), default=0)
    too_long = f"{key}: a pattern of {longest} characters; at most {_LENGTH} are read"
    return [too_long] if longest > _LENGTH else []


def _wrong_number(key: str, value: Any) -> list[str]:
    """r is a rank, lora_alpha any number of float32 but NaN and infinity."""
    if key == "r":
        right = type(value) is int and 1 <= value < 1 << 31
        return [] if right else [f"r={_short(value)}: must be a whole number of at least 1"]
    right = type(value) in (int, float) and abs(value) <= _FLOAT32_MAX
    return [] if right else [f"lora_alpha={_short(value)}: must be a number that float32 holds"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tensors_file(directory: Path) -> Path:
    file = directory / TENSORS
    if not file.is_file() and (directory / PICKLE).is_file():
        raise UserError(
            f"{directory}: {PICKLE} is a pickle, which can run any code when it is read; save the"
            " adapter as safetensors (peft: model.save_pretrained(DIR))"
        )
    return file


def _targeted(
    config: Mapping[str, Any], modules: list[str], where: Path
) -> dict[str, tuple[int, float]]:
    """{module that peft adapts: (its rank, its scale)}, as peft 0.21 matches names
    (check_target_module_exists, get_pattern_key)."""
    names = config.get("target_modules")
    names = _DEFAULT_MODULES if names is None else names
    found: dict[str, tuple[int, float]] = {}
    try:
        with _limited(_SECONDS):
            for module in modules:
                if not _is_excluded(config, module) and _is_named(config, names, module):
                    rank = _by_pattern(config, "rank_pattern", module, config["r"])
                    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
                    found[module] = rank, alpha * (rank**0.5 if config.get("use_rslora") else 1)
    except TimeoutError as error:  # between two matches
        raise UserError(f"{where}: rank_pattern, alpha_pattern or *_modules {_TOO_LONG}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return found


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within, where a regular expression is matched, too. Only the main thread
    can have that."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


_compiled = functools.lru_cache(maxsize=4 * _PATTERNS)(re.compile)


def _match(key: str, pattern: str, module: str, within: str = "") -> re.Match | None:
    """key: the setting that the pattern comes from. within: the expression that peft puts it into;
    else it must match the whole name. Raises ValueError naming setting and pattern."""
    try:
        if within:
            return _compiled(within % pattern).match(module)
        return _compiled(pattern).fullmatch(module)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {_short(pattern)} is no regular expression: {error}") from error
    except TimeoutError as error:
        raise ValueError(f"{key}: {_short(pattern)} {_TOO_LONG}") from error


def _ends_with(module: str, names: Any) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_excluded(config: Mapping[str, Any], module: str) -> bool:
    excluded, saved = config.get("exclude_modules") or (), config.get("modules_to_save") or ()
    if isinstance(excluded, str) and _match("exclude_modules", excluded, module):
        return True
    if not isinstance(excluded, str) and _ends_with(module, excluded):
        return True
    return any(_match("modules_to_save", name, module, r"(^|.*\.)%s($|\..*)") for name in saved)


def _is_named(config: Mapping[str, Any], names: Any, module: str) -> bool:
    if isinstance(names, str):
        return names.lower() == "all-linear" or bool(_match("target_modules", names, module))
    if module in names:
        return True
    some = config.get("layers_to_transform")
    if not _ends_with(module, names) or some is None or some == []:
        return _ends_with(module, names)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        within = r"(?:^|.*?\.)%s\.(?P<layer>\d+)\."
        if match := _match("layers_pattern", pattern, module, within):
            return int(match["layer"]) in (some if isinstance(some, list) else [some])
    return False


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    for pattern, value in (config.get(key) or {}).items():
        if _match(key, pattern, module, r"(.*\.)?(%s)$"):
            return value
    return default


def _compare(module: str, found: Mapping[str, np.ndarray], rank: int | None) -> list[str]:
    """Problems of a module's tensors; rank: what the config says."""
    problems = [f"missing {module}.lora_{factor}" for factor in "AB" if factor not in found]
    for factor, array in found.items():
        if array.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            problems.append(f"{module}.lora_{factor} is {array.dtype.name}, no floating point")
        elif array.ndim != 2:
            problems.append(f"{module}.lora_{factor} is {array.shape}, no matrix")
        elif not is_finite(_float32(array)):
            problems.append(f"{module}.lora_{factor} holds NaN, infinity or what float32 does not")
    if not problems and rank not in (None, len(found["A"])):
        problems.append(f"{module} has rank {len(found['A'])}, but r and rank_pattern say {rank}")
    if not problems and found["A"].shape[0] != found["B"].shape[1]:
        problems.append(f"{module}: A is {found['A'].shape}, B {found['B'].shape}")
    return problems


def _float32(array: np.ndarray) -> np.ndarray:
    """What is beyond float32 becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _why(key: str, base: ModelConfig) -> str:
    """Why a tensor cannot be read, by the setting that it comes from."""
    lora, layer = _LORA.fullmatch(key), re.search(r"\blayers\.(\d+)\.", key)
    if not key.startswith("base_model.model."):
        return "names without base_model.model., which peft leaves out; save it with peft"
    if key.startswith("base_model.model.layers."):
        return "of a model without a head (task_type), which peft leaves out on one with a head"
    if layer and int(layer[1]) >= base.layers:
        return f"of another model: the base has {base.layers} layers"
    if ".lora_embedding_" in key:
        return f"target_modules: LoRA on an embedding; {MERGE}"
    if "lora_magnitude_vector" in key:
        return f"use_dora: {MERGE}"
    if ".token_adapter." in key or "trainable_tokens" in key:
        return f"trainable_token_indices: {MERGE}"
    if key.endswith(".lora_B.bias"):
        return f"lora_bias: {_REFUSED['lora_bias']}"
    if key.endswith(".bias"):
        return "bias: no map has one here"
    if lora and lora[3] not in (None, "default"):
        return (
            f"saved under the adapter's name {lora[3]!r}, which peft leaves out; save it with peft"
        )
    if lora:
        return f"target_modules: LoRA on what has none here; {MERGE}"
    return "unknown"


def _fit(
    found: Mapping[tuple[int, str], tuple[Mapping[str, np.ndarray], tuple[int, float]]],
    config: Mapping[str, Any],
    base: ModelConfig,
    where: Path,
) -> tuple[ModelConfig, dict[str, np.ndarray], list[str]]:
    """{(layer, target): (its A and B, (rank, rank times scale))} -> one rank and one scale a layer,
    the same function."""
    largest: dict[int, int] = {}
    for (layer, _), (_, (rank, _)) in found.items():
        largest[layer] = max(rank, largest.get(layer, 0))
    # what alpha would have to be for each map
    wanted = {
        place: alpha * (largest[place[0]] / rank) for place, (_, (rank, alpha)) in found.items()
    }
    sizes = Counter(abs(alpha) for alpha in wanted.values() if alpha)
    if not sizes:
        raise UserError(f"{where}: lora_alpha=0: computes what the base does")
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

    shapes = {name: slot.shape for name, slot in slots(base).items()}
    tensors: dict[str, np.ndarray] = {}
    for layer in largest:
        for target in targets:
            outputs, inputs = shapes[f"model.layers.{layer}.{MODULES[target]}.weight"]
            factors, _ = found.get((layer, target), ({}, None))
            a = factors.get("A", np.zeros((0, inputs), np.float32)).astype(np.float32)
            b = factors.get("B", np.zeros((outputs, 0), np.float32)).astype(np.float32)
            factor = wanted.get((layer, target), alpha) / alpha
            if factor != 1:
                with np.errstate(over="ignore", invalid="ignore"):
                    b = _float32(b.astype(np.float64) * factor)
                if not is_finite(b):
                    raise UserError(
                        f"{where}: lora_alpha and alpha_pattern scale model.layers.{layer}."
                        f"{MODULES[target]} beyond float32"
                    )
            more = largest[layer] - len(a)
            tensors[f"layers.{layer}.{target}.a"] = np.pad(a, ((0, more), (0, 0)))[None]
            tensors[f"layers.{layer}.{target}.b"] = np.pad(b, ((0, 0), (0, more)))[None]
    return model, tensors, _notes(found, largest, wanted, alpha, len(targets))


def _notes(
    found: Mapping[tuple[int, str], tuple[Any, tuple[int, float]]],
    largest: Mapping[int, int],
    wanted: Mapping[tuple[int, str], float],
    alpha: float,
    targets: int,
) -> list[str]:
    notes = []
    if absent := len(largest) * targets - len(found):
        notes.append(f"{_maps(absent)} without LoRA in adapted layers: zeros")
    if padded := sum(rank < largest[layer] for (layer, _), (_, (rank, _)) in found.items()):
        notes.append(f"{_maps(padded)} of lower rank than others of the layer: padded with zeros")
    folded = [x / alpha for x in wanted.values() if x != alpha]
    if folded:
        rounded = sum(abs(math.frexp(factor)[0]) not in (0, 0.5) for factor in folded)
        how = f", {rounded} rounded to float32 by it" if rounded else ", every bit kept"
        notes.append(f"{_maps(len(folded))} of another scale: taken into B{how}")
    return notes


def _maps(count: int) -> str:
    return f"{count} map{'s' if count > 1 else ''}"


def write(directory: Path, model: ModelConfig, ours: Mapping[str, np.ndarray], base: str) -> None:
    """As peft saves a LoRA, with the maps and ranks that are not zero. Raises UserError where there
    are several experts, a gate, or zeros only."""
    assert model.lora
    specs = model.lora.specs(model.layers)
    if any(spec and spec.has_router for spec in specs):
        raise UserError(
            "peft knows LoRA of one expert without a gate; merge this adapter, or export it in our"
            " own format"
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, spec in enumerate(specs):
        for target in spec.targets if spec else ():
            assert spec
            a, b = (ours[f"layers.{layer}.{target}.{factor}"][0] for factor in "ab")
            rank = int((a.any(1) | b.any(0)).nonzero()[0].max(initial=-1)) + 1
            if not rank:
                continue
            module = f"model.layers.{layer}.{MODULES[target]}"
            ranks[module], alphas[module] = rank, model.lora.alpha * (rank / spec.rank)
            name = f"base_model.model.{module}.lora_"
            tensors[f"{name}A.weight"] = np.ascontiguousarray(a[:rank])
            tensors[f"{name}B.weight"] = np.ascontiguousarray(b[:, :rank])
    if not tensors:
        raise UserError("every map of this adapter is zero: there is no LoRA to write")
    (directory / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    usual_rank = Counter(ranks.values()).most_common(1)[0][0]
    usual_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
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


def _modules(names: list[str], model: ModelConfig) -> dict[str, Any]:
    """target_modules and layers_to_transform: short where every adapted layer has the same maps."""
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
