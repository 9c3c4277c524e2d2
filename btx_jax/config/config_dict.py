"""Strict conversion of configs to dictionaries and back.

A config file returns a `Config`, or an `ml_collections.ConfigDict` made by `to_config_dict`; the
command line overrides leaves of a ConfigDict; and `from_config_dict` converts it back to a
`Config`. Unknown keys, wrong types and invalid values raise `ConfigError`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from btx_jax.config.config import Config
from btx_jax.config.schema import from_dict
from btx_jax.errors import ConfigError

MAX_DEPTH = 20  # levels of nested sections; twice what a pipeline's stages need


def to_dict(config: Any) -> Any:
    """Convert a config dataclass to plain dicts, lists and scalars; sections that are None are
    omitted."""
    if dataclasses.is_dataclass(config):
        values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: to_dict(value) for name, value in values if value is not None}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


class _Names(ml_collections.ConfigDict):
    """A mapping whose keys the user chooses: config_flags can look up any key ("" if it is new) and
    set it."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) if key in self else ""

    def __setitem__(self, key: str, value: Any) -> None:
        with self.unlocked():
            super().__setitem__(key, value)

    def get_type(self, key: str) -> type:
        return str


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Convert a config to a ConfigDict whose keys a config file or the command line can assign:
    every key is present, and no other can be added, except names of domains and of evaluated
    models."""

    def converted(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            kind = _Names if key in ("domains", "models") else ml_collections.ConfigDict
            return kind({k: converted(k, v) for k, v in value.items()}, sort_keys=False)
        # config_flags parses an override of a tuple, not of a list
        return tuple(converted("", v) for v in value) if isinstance(value, list) else value

    return converted("", to_dict(config))


def from_config_dict(config: ml_collections.ConfigDict | Config) -> Config:
    """Convert a ConfigDict to a Config; a Config is returned unchanged."""
    if isinstance(config, Config):
        return config
    require_tree(config)
    return from_dict(Config, config.to_dict())


def require_tree(config: Any) -> None:
    """Raise ConfigError for a required_placeholder without a value, and for nesting so deep that it
    can only be a cycle."""
    todo = [("config", config, 0)]
    while todo:
        key, value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"{key[:100]}...: nested too deeply or contains itself; flatten it")
        if isinstance(value, tuple | list):
            todo += [(f"{key}[{i}]", part, depth + 1) for i, part in enumerate(value)]
        elif isinstance(value, Mapping | ml_collections.ConfigDict):
            for name in value:
                try:
                    todo.append((f"{key}.{name}", value[name], depth + 1))
                except ml_collections.config_dict.RequiredValueError:
                    raise ConfigError(
                        f"{key}.{name}: a required_placeholder without a value; set it in the file"
                    ) from None


def flatten(values: Any, key: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists are leaves."""
    if not isinstance(values, Mapping):
        return {key: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{key}.{name}" if key else name)
    return flat


@dataclasses.dataclass(frozen=True)
class Difference:
    """One leaf that differs between two `to_dict` results; None where it is missing."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every leaf in which two `to_dict` results differ."""
    old, new = flatten(old), flatten(new)
    return [
        Difference(key, old.get(key), new.get(key))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
