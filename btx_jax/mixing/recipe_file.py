"""Recipe files: YAML in mergekit-moe's format, and prompt files, both of bounded size."""

import dataclasses
import functools
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from btx_jax.config.mix_methods import owners
from btx_jax.config.ridge import RidgeConfig
from btx_jax.config.schema import MAX_NAMES, from_dict, shown
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.mixing.recipe import ExpertSource, Recipe
from btx_jax.paths import to_path

MAX_RECIPE, MAX_PROMPTS = 1 << 18, 1 << 24  # maximum bytes: recipe, all prompt files
MAX_NODES = 100_000  # maximum nodes of a recipe, with aliases expanded
KEPT = "mergekit_moe_config.yml"  # name under which a mixture keeps its recipe, as in mergekit-moe


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys (YAML would silently keep the last) and aliases that
    expand to more nodes than a file of the maximum size could contain."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self._size(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases expand to more than {MAX_NODES} values; write them out")
        return node

    def _size(self, node: Any, known: dict[int, int]) -> int:
        """Number of nodes, with aliases expanded."""
        if id(node) not in known:
            known[id(node)] = MAX_NODES + 1  # in case the node contains itself
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
    """Read a recipe from a YAML file. Raises UserError with one line that names keys and cures."""
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


def _prompts(file: str, key: str) -> list[str]:
    """The non-blank lines of a file. Raises ConfigError."""
    try:
        lines = _text(to_path(file, key), MAX_PROMPTS).split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{key}: contains no prompt; write one per line")
    if len(prompts) > MAX_NAMES:
        raise ConfigError(f"{key}: {len(prompts)} prompts, at most {MAX_NAMES}; choose some")
    return prompts


def _text(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes. Raises OSError or ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def _with_files_read(recipe: Recipe) -> Recipe:
    """The recipe with prompt files replaced by their lines, each file read once. Raises
    ConfigError."""
    read: dict[str, list[str]] = {}
    total = 0

    def with_prompts(expert: ExpertSource, where: str) -> ExpertSource:
        nonlocal total
        changes: dict[str, Any] = {}
        for kind in ("positive_prompts", "negative_prompts"):
            if not (file := getattr(expert, f"{kind}_file")):
                continue
            key = f"{where}.{kind}_file={shown(file)}"
            if file not in read:
                read[file] = _prompts(file, key)
            total += sum(len(prompt) + 1 for prompt in read[file])
            if total > MAX_PROMPTS:
                raise ConfigError(
                    f"{key}: with the files before it, more than {MAX_PROMPTS} bytes of prompts;"
                    " choose some"
                )
            changes |= {kind: (*getattr(expert, kind), *read[file]), f"{kind}_file": ""}
        return dataclasses.replace(expert, **changes) if changes else expert

    def all_of(key: str) -> tuple[ExpertSource, ...]:
        named: tuple[ExpertSource, ...] = getattr(recipe, key)
        return tuple(with_prompts(expert, f"{key}[{i}]") for i, expert in enumerate(named))

    return dataclasses.replace(
        recipe, experts=all_of("experts"), shared_experts=all_of("shared_experts")
    )


def expert_sources(mixture: Path) -> list[str]:
    """The source model of each expert of a mixture, from the recipe stored with its weights; [] if
    there is no recipe, or if every expert is made from all models."""
    path = mixture / KEPT
    if not path.exists():
        return []
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        sources = [str(expert["source_model"]) for expert in recipe["experts"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; delete it") from error
    method, chunks = recipe.get("method", Recipe.method), recipe.get("chunks", Recipe.chunks)
    return [sources[number] for number in owners(method, len(sources), chunks)]


def _without_none(values: Any) -> Any:
    """The values without nulls: mergekit writes unset options as null."""
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_without_none(value) for value in values] if isinstance(values, list) else values


def _as_ours(values: dict[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """The values with numbers parsed, and without those of mergekit's keys that ask for what
    btx_jax always does."""
    values = _with_numbers(Recipe, values)
    for key in ("experts", "shared_experts"):
        if isinstance(experts := values.get(key), list):
            values[key] = [
                _with_numbers(ExpertSource, expert) if isinstance(expert, dict) else expert
                for expert in experts
            ]
    if isinstance(ridge := values.get("ridge"), dict):
        values["ridge"] = _with_numbers(RidgeConfig, ridge)
    if isinstance(dtype := values.get("dtype"), str):
        values["dtype"] = dtype.removeprefix("torch.")
    source = values.pop("tokenizer_source", "base")
    if source not in ("base", values.get("base_model")):
        mistakes.add(
            f"recipe.tokenizer_source={shown(source)}: the mixture always gets base_model's"
            " tokenizer; set it to base or leave it out"
        )
    return values


def _with_numbers(section: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values with text parsed where a number is expected: YAML 1.1 reads 1e-4 as text, mergekit
    as 0.0001."""
    kinds = _kinds(section)
    return {
        key: _number(value, kinds[key]) if key in kinds else value for key, value in values.items()
    }


@functools.cache
def _kinds(section: type) -> dict[str, type]:
    hints = typing.get_type_hints(section)
    return {key: kind for key, kind in hints.items() if kind in (int, float)}


def _number(value: Any, kind: type) -> Any:
    """Parse a number from text as pydantic does, except booleans; other values are returned
    unchanged."""
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str) or not value.isascii():
        return value
    text = re.sub(r"\.0+$", "", value.strip()) if kind is int else value
    try:
        return kind(text)
    except ValueError:
        return value
