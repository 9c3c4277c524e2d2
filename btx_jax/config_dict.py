"""Configs as dictionaries and back, strictly.

A config file returns an `ml_collections.ConfigDict` made by `to_config_dict`; the command line
overrides leaves of it; and `from_config_dict` turns it back into a `Config`. An unknown key and a
wrong type raise `ConfigError`, as an impossible value does.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from btx_jax.config import Config
from btx_jax.errors import ConfigError, suggest

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A config dataclass as plain dicts, lists and scalars; sections that are None are left out."""
    if dataclasses.is_dataclass(config):
        values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: to_dict(value) for name, value in values if value is not None}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """What a config file returns: every key is there, so that the command line can override it and
    no other."""

    def overridable(value: Any) -> Any:
        # config_flags parses an override of a tuple, not of a list; sections keep their order.
        if isinstance(value, dict):
            items = {key: overridable(item) for key, item in value.items()}
            return ml_collections.ConfigDict(items, sort_keys=False)
        return tuple(overridable(item) for item in value) if isinstance(value, list) else value

    return overridable(to_dict(config))


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    return from_dict(Config, config.to_dict())


def from_dict(cls: type[T], values: Mapping[str, Any], key: str = "config") -> T:
    """Dict -> dataclass, strictly. Raises ConfigError naming the key of the first unknown, missing,
    mistyped or impossible value."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}={values!r}: must be a section with keys")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"{key}.{name}: unknown key; {suggest(name, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ConfigError(f"{key}.{name}: missing")
    parsed = {
        name: _convert(hints[name], value, f"{key}.{name}")
        for name, value in values.items()
        if value is not None
    }
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(
            f"{key}.{error}" if not str(error).startswith("config.") else str(error)
        ) from None


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only ever `Section | None`
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, key)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{key}={value!r}: must be a list")
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: must map names to values")
        return {name: _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}={value!r}: must be {kind.__name__}, not {type(value).__name__}")
    return value


def flatten(values: Any, key: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists are leaves."""
    if not isinstance(values, Mapping):
        return {key: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{key}.{name}" if key else name)
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every leaf in which two `to_dict` results differ."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
