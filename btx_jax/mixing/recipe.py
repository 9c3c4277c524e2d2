"""Recipes: which models become which mixture. A mergekit-moe YAML is one; the keys that follow its
own are ours."""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from btx_jax.config.schema import (
    HUGE,
    MAX_NAMES,
    Choice,
    Experts,
    Range,
    Section,
    from_dict,
    rule,
    shown,
)
from btx_jax.errors import ConfigError, Mistakes, UserError

PROMPT_MODES = ("cheap_embed", "hidden", "hidden_avg", "router_input")
HIDDEN_LAST = "hidden_last"  # mergekit's other name for hidden
GATE_MODES = ("normal", "random", "uniform_random", *PROMPT_MODES, HIDDEN_LAST)
MAX_EXPERTS = 1024
MAX_RECIPE, MAX_PROMPTS = 1 << 18, 1 << 24  # bytes of a recipe, of its files of prompts together
MAX_NODES = 100_000  # of a recipe, with its aliases written out
KEPT = "mergekit_moe_config.yml"  # a mixture's recipe beside its weights, as mergekit-moe keeps it
DIFFERENCES = (
    "vocab_size",
    "heads",
    "kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "tied_head",
    "tokenizer",
)


@dataclass(frozen=True)
class ExpertSource(Section):
    """One expert: a dense model and, for gate modes that read prompts, what should be routed to it.

    positive_prompts_file, negative_prompts_file: more prompts, one a line, which `read_recipe` puts
    behind the others. noise_scale: standard deviation of normal noise added to its feed-forward
    weights. residual_scale: factor on its down projection.
    """

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    positive_prompts_file: str = ""
    negative_prompts_file: str = ""
    noise_scale: Annotated[float, Range(0, 1e3)] = 0.0
    residual_scale: Annotated[float, Range(-HUGE, HUGE)] = 1.0


def _prompts(file: str, key: str) -> list[str]:
    """The lines of a file that are not blank. Raises ConfigError."""
    try:
        lines = _text(Path(file), MAX_PROMPTS).split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{key}: holds no prompt; write one a line")
    if len(prompts) > MAX_NAMES:
        raise ConfigError(f"{key}: {len(prompts)} prompts, at most {MAX_NAMES}; choose some")
    return prompts


def _text(path: Path, most: int) -> str:
    """A regular file of at most `most` bytes. Raises OSError or ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text ({error.reason} at byte {error.start})") from error


@dataclass(frozen=True)
class Recipe(Section):
    """A mixture of experts.

    base: where everything but the feed-forwards comes from: `copy` (base_model, as mergekit does)
    or `average` (the mean of all distinct experts' models, as Branch-Train-MiX does; list the seed
    among the experts to include it).
    method: `stack` (one expert per source), `split` (each source's feed-forward cut into `chunks`
    experts) or `blend` (expert n is the n-th of N chunks of every source); the latter two are
    ablations of the BTX paper, section 4.4.
    merge: how `average` averages: `mean`, `ties` (arXiv 2306.01708: keep the `density` largest
    changes from base_model, elect signs, mean of those that agree) or `dare` (arXiv 2311.03099:
    drop changes at random down to `density`, rescale, mean).
    layers: the layers that become mixtures; the others stay dense. Empty for all.
    gate_mode: how routers start; `hidden` when base is copy, `normal` (std 0.02, to be trained)
    when it is average.
    gate_pooling, gate_scale: of router_input: `mean` over tokens or `last`; the length of every
    router row.
    allow: settings in which sources may differ from base_model although it changes what their
    weights mean.
    """

    base_model: str
    experts: tuple[ExpertSource, ...]
    gate_mode: Annotated[str, Choice(GATE_MODES, empty=True)] = ""
    dtype: Annotated[str, Choice(("float32", "bfloat16", "float16"), empty=True)] = ""
    experts_per_token: Experts = 2
    base: Annotated[str, Choice(("copy", "average"))] = "copy"
    method: Annotated[str, Choice(("stack", "split", "blend"))] = "stack"
    chunks: Annotated[int, Range(2, MAX_EXPERTS)] = 2
    merge: Annotated[str, Choice(("mean", "ties", "dare"))] = "mean"
    density: Annotated[float, Range(1e-6, 1)] = 0.2
    layers: tuple[Annotated[int, Range(0, 10_000)], ...] = ()
    gate_pooling: Annotated[str, Choice(("mean", "last"))] = "mean"
    gate_scale: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    allow: tuple[Annotated[str, Choice(DIFFERENCES)], ...] = ()
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self):
        super().__post_init__()
        mode = {"": "hidden" if self.base == "copy" else "normal", HIDDEN_LAST: "hidden"}
        object.__setattr__(self, "gate_mode", mode.get(self.gate_mode, self.gate_mode))

    @rule
    def _some_experts(self) -> Iterator[str]:
        if not self.experts:
            yield "experts: none named"
        elif expert_count(self) > MAX_EXPERTS:
            yield f"experts: {expert_count(self)}; at most {MAX_EXPERTS}"
        elif self.experts_per_token > expert_count(self):
            yield (
                f"experts_per_token={self.experts_per_token}: more than the {expert_count(self)}"
                " experts; lower it or add experts"
            )

    @rule
    def _what_is_read(self) -> Iterator[str]:
        if self.gate_scale != Recipe.gate_scale and self.gate_mode != "router_input":
            yield f"gate_scale={self.gate_scale}: of gate_mode router_input; leave it out"
        if self.density != Recipe.density and self.merge == "mean":
            yield f"density={self.density}: of merge ties and dare; leave it out or name one"

    @rule
    def _merge_of_average(self) -> Iterator[str]:
        if self.merge != "mean" and self.base != "average":
            yield f"merge={self.merge!r}: says how to average, so it needs base: average"

    @rule
    def _split_of_all_layers(self) -> Iterator[str]:
        if self.method == "split" and self.layers:
            yield (
                "method: split makes narrower feed-forwards, which all layers must share; leave"
                " layers out"
            )

    @rule
    def _gates_of_sources(self) -> Iterator[str]:
        mode = self.gate_mode or ("hidden" if self.base == "copy" else "normal")
        if mode not in (*PROMPT_MODES, HIDDEN_LAST):
            return
        if self.method != "stack":
            yield (
                f"gate_mode={mode!r}: experts of method {self.method!r} belong to no source; use"
                " normal"
            )
        missing = [
            str(i)
            for i, expert in enumerate(self.experts)
            if not (expert.positive_prompts or expert.positive_prompts_file)
        ]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            yield (
                f"experts[{'], ['.join(missing[:10])}]{more}: no positive_prompts, and"
                f" gate_mode={mode!r} reads them"
            )
        elif len(self.experts) > 1 and len({_prompts_of(expert) for expert in self.experts}) == 1:
            yield (
                "experts: all have the same prompts, so that all router rows would be equal; use"
                " gate_mode: normal"
            )

    @property
    def expert_count(self) -> int:
        return expert_count(self)


def _prompts_of(expert: ExpertSource) -> tuple:
    return (
        expert.positive_prompts,
        expert.negative_prompts,
        expert.positive_prompts_file,
        expert.negative_prompts_file,
    )


def expert_count(recipe: Recipe) -> int:
    """Also for rules, whose recipe is not whole."""
    return len(recipe.experts) * (recipe.chunks if recipe.method == "split" else 1)


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice, of which YAML would silently keep the last, and aliases
    that stand for more than a file could hold."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self._size(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES} values; write them out")
        return node

    def _size(self, node: Any, known: dict[int, int]) -> int:
        """How many nodes this is, aliases written out."""
        if id(node) not in known:
            known[id(node)] = MAX_NODES + 1  # within itself
            parts = node.value if not isinstance(node, yaml.ScalarNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            known[id(node)] = 1 + sum(self._size(part, known) for part in parts)
        return known[id(node)]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        seen = set()
        for key, _ in pairs:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(name)} appears twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """Raises UserError with one line that names keys and cures."""
    try:
        values = _without_none(yaml.load(_text(path, MAX_RECIPE), Loader=_Loader))
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:500]}") from error
    mistakes = Mistakes()
    if isinstance(values, dict):
        values = _as_ours(values, mistakes)
    recipe = None
    with mistakes.gather():
        recipe = from_dict(Recipe, values, "recipe")
    if recipe:
        with mistakes.gather("recipe."):
            recipe = _with_files_read(recipe)
    try:
        mistakes.tell()
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    assert recipe is not None
    return recipe


def _with_files_read(recipe: Recipe) -> Recipe:
    """With the lines of the files of prompts in place of their names, each read once. Raises
    ConfigError."""
    read: dict[str, list[str]] = {}
    total = 0
    experts = []
    for i, expert in enumerate(recipe.experts):
        changes: dict[str, Any] = {}
        for kind in ("positive_prompts", "negative_prompts"):
            if not (file := getattr(expert, f"{kind}_file")):
                continue
            key = f"experts[{i}].{kind}_file={shown(file)}"
            if file not in read:
                read[file] = _prompts(file, key)
            total += sum(len(prompt) + 1 for prompt in read[file])
            if total > MAX_PROMPTS:
                raise ConfigError(
                    f"{key}: with the files before it, more than {MAX_PROMPTS} bytes of prompts;"
                    " choose some"
                )
            changes |= {kind: (*getattr(expert, kind), *read[file]), f"{kind}_file": ""}
        experts.append(dataclasses.replace(expert, **changes) if changes else expert)
    return dataclasses.replace(recipe, experts=tuple(experts))


def expert_sources(mixture: Path) -> list[str]:
    """The model behind each expert of a mixture, by the recipe kept beside its weights; empty where
    there is none, or every expert is made of all."""
    path = mixture / KEPT
    if not path.exists():
        return []
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        sources = [str(expert["source_model"]) for expert in recipe["experts"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; delete it") from error
    if recipe.get("method") == "blend":
        return []
    chunks = recipe.get("chunks", Recipe.chunks) if recipe.get("method") == "split" else 1
    return [source for source in sources for _ in range(chunks)]


def _without_none(values: Any) -> Any:
    """mergekit writes unset options as null."""
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_without_none(value) for value in values] if isinstance(values, list) else values


def _as_ours(values: dict[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """Without the keys of mergekit that say here what is so anyway, numbers as numbers."""
    values = _with_numbers(Recipe, values)
    if isinstance(experts := values.get("experts"), list):
        values["experts"] = [
            _with_numbers(ExpertSource, expert) if isinstance(expert, dict) else expert
            for expert in experts
        ]
    if isinstance(dtype := values.get("dtype"), str):
        values["dtype"] = dtype.removeprefix("torch.")
    architecture = values.pop("architecture", "")
    if not isinstance(architecture, str) or not "mixtral".startswith(architecture.lower()):
        mistakes.add(
            f"recipe.architecture={shown(architecture)}: a mixture here is a Mixtral; say mixtral"
            " or leave it out"
        )
    source = values.pop("tokenizer_source", "base")
    if source not in ("base", values.get("base_model")):
        mistakes.add(
            f"recipe.tokenizer_source={shown(source)}: the mixture gets base_model's tokenizer; say"
            " base or leave it out"
        )
    if shared := values.pop("shared_experts", []):
        mistakes.add(
            f"recipe.shared_experts={shown(shared)}: a Mixtral has none; list them under experts or"
            " leave them out"
        )
    return values


def _with_numbers(section: type, values: dict[str, Any]) -> dict[str, Any]:
    """Text that is a number, where one is wanted: YAML 1.1 reads 1e-4 as text, mergekit as 0.0001."""
    kinds = _kinds(section)
    return {
        key: _number(value, kinds[key]) if key in kinds else value for key, value in values.items()
    }


@functools.cache
def _kinds(section: type) -> dict[str, type]:
    hints = typing.get_type_hints(section)
    return {key: kind for key, kind in hints.items() if kind in (int, float)}


def _number(value: Any, kind: type) -> Any:
    """As pydantic reads it, but for booleans; the value itself where it is no number."""
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str) or not value.isascii():
        return value
    text = re.sub(r"\.0+$", "", value.strip()) if kind is int else value
    try:
        return kind(text)
    except ValueError:
        return value


def describe(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)
