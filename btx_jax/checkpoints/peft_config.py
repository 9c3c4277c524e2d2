"""peft's adapter_config.json: which settings are supported, and which modules they select."""

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btx_jax.architectures.family import Family
from btx_jax.architectures.registry import family_for
from btx_jax.checkpoints.problems import listed, raise_problems
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError

TENSORS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MERGE = (
    "merge it with peft (model.merge_and_unload().save_pretrained(DIR)) and take the whole model"
)
# Settings of LoraConfig that change what a LoRA computes -> advice.
REFUSED = dict.fromkeys(
    (
        "kasa_config", "layer_replication", "monteclora_config", "target_parameters",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    ),
    MERGE,
) | {
    "alora_invocation_tokens": "it only acts after certain tokens; train one without it",
    "arrow_config": "it routes between other LoRAs; import those one by one",
    "lora_bias": "B has no bias here; where the base's maps have one, "
    f"{MERGE}, else train one with lora_bias=False",
}  # fmt: skip
# Settings that concern training or other kinds of models, or are evident from the tensors.
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
_PATTERNS, _LENGTH = 1000, 10_000  # limits of one setting: number of patterns, characters in each
_SECONDS = 10  # limit for matching all patterns: a regular expression may take years
_TOO_LONG = f"takes too long to match (all together may take {_SECONDS} s): simplify it"
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def family_of(base: ModelConfig, origin: str) -> Family:
    """The family whose module names peft uses for a model. origin: its model_type, "" for a model
    created here. Raises UserError where Hugging Face has no such model."""
    try:
        return family_for(base, origin)
    except UserError as error:
        raise UserError(f"peft adapts Hugging Face's models, not this one: {error}") from error


def others(directory: Path) -> list[str]:
    """Names of adapters in subdirectories, where peft saves all but the one called default."""
    return sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))


def read_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json, and check every setting for support."""
    file = directory / CONFIG
    if not file.is_file() and (found := others(directory)):
        raise UserError(f"{directory}: holds adapters in folders; name one: {listed(found)}")
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
        f"{key}={short(config[key])}: not supported by LoRA here; {cure}"
        for key, cure in REFUSED.items()
        if config.get(key) not in (None, False, {}, [])
    ]
    how = config.get("init_lora_weights")
    if (how.lower() if isinstance(how, str) else how) not in _INITIALISATIONS_OF_LORA_ALONE:
        problems.append(
            f"init_lora_weights={short(how)}: changed the base itself; save it with"
            f" path_initial_model_for_weight_conversion, or {MERGE}"
        )
    problems += [
        f"{key}={short(value)}: not a setting of peft 0.21 (this was written by"
        f" {config.get('peft_version')}); if it changes nothing, delete it there, else {MERGE}"
        for key, value in config.items()
        if key not in {*_READ, *_WITHOUT_EFFECT, *REFUSED} and value not in (None, False, {}, [])
    ]
    for key in ("r", "lora_alpha"):
        problems += _wrong_number(key, config.get(key))
    for key, of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key}={short(pattern)}: must map names to numbers")
            continue
        for name, value in pattern.items():
            problems += [f"{key}: {short(name)[1:-1]}: {line}" for line in _wrong_number(of, value)]
        problems += _too_much(key, list(pattern))
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(
            f"lora_dropout={short(dropout)}: must lie in [0, 1); it acts in training only"
        )
    for key in _NAMES:
        value = config.get(key)
        names = [value] if isinstance(value, str) else value
        if isinstance(value, str) and key == "modules_to_save":
            problems.append(f"{key}={short(value)}: must be a list of names")
        elif isinstance(names, list) and all(isinstance(name, str) for name in names):
            problems += _too_much(key, names)
        elif value is not None:
            problems.append(f"{key}={short(value)}: must be names")
    some = config.get("layers_to_transform")
    if some is not None and not all(
        type(layer) is int for layer in (some if isinstance(some, list) else [some])
    ):
        problems.append(f"layers_to_transform={short(some)}: must be layers' numbers")
    raise_problems(file, problems)
    return config


def _too_much(key: str, patterns: Sequence[str]) -> list[str]:
    if len(patterns) > _PATTERNS:
        return [f"{key}: {len(patterns)} patterns; at most {_PATTERNS} are read"]
    longest = max(map(len, patterns), default=0)
    too_long = f"{key}: a pattern of {longest} characters; at most {_LENGTH} are read"
    return [too_long] if longest > _LENGTH else []


def _wrong_number(key: str, value: Any) -> list[str]:
    """Problems of r, which must be a rank, and lora_alpha, which may be any finite float32."""
    if key == "r":
        right = type(value) is int and 1 <= value < 1 << 31
        return [] if right else [f"r={short(value)}: must be a whole number of at least 1"]
    right = type(value) in (int, float) and abs(value) <= _FLOAT32_MAX
    return [] if right else [f"lora_alpha={short(value)}: must be a number within float32"]


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def targeted(
    config: Mapping[str, Any], family: Family, modules: Sequence[str], where: Path
) -> dict[str, tuple[int, float]]:
    """{adapted module: (rank, alpha)}, matching names as peft 0.21 does
    (check_target_module_exists, get_pattern_key). alpha / rank is the scale, also with
    use_rslora."""
    names = config.get("target_modules")
    names = family.peft_default if names is None else names
    if not names and config.get("target_modules") is None:
        raise UserError(
            f"{where}: names no target_modules, and peft has no default for"
            f" {family.model_type}: list the trained modules there"
        )
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
    """Raise TimeoutError inside the block after this time, even while a regular expression is
    matched. Main thread only."""

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
    """Match a pattern against a module's name. key: the setting that contains the pattern. within:
    the expression into which peft inserts it; without one it must match the whole name. Raises
    ValueError that names the setting and the pattern."""
    try:
        if within:
            return _compiled(within % pattern).match(module)
        return _compiled(pattern).fullmatch(module)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {short(pattern)} is not a regular expression: {error}") from error
    except TimeoutError as error:
        raise ValueError(f"{key}: {short(pattern)} {_TOO_LONG}") from error


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
