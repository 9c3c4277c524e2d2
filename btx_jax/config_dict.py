"""Configs as dictionaries and back, strictly.

A config file returns an `ml_collections.ConfigDict` made by `to_config_dict`; the command line
overrides leaves of it; and `from_config_dict` turns it back into a `Config`. Unknown keys and wrong
types raise `ConfigError`, as impossible values do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from btx_jax.config import Config
from btx_jax.schema import from_dict


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

    def tuples(value: Any) -> Any:  # config_flags parses an override of a tuple, not of a list
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(to_dict(config)), sort_keys=False)


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    return from_dict(Config, config.to_dict())


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
