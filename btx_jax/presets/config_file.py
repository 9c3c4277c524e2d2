"""Config files (Python whose `get_config` returns a Config or a ConfigDict), presets by name, and
command-line overrides. All mistakes are reported together, each in one line.

A Config is immutable, so that it stays valid. A file that assigns to fields of a preset does so on
`to_config_dict(recipes.seed("tiny"))`, for example, and returns that.
"""

import dataclasses
import importlib.util
import inspect
import re
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from btx_jax.config.config import Config
from btx_jax.config.config_dict import from_config_dict, require_tree, to_config_dict
from btx_jax.errors import ConfigError, Mistakes, UserError, one_line, suggest
from btx_jax.presets.registry import PRESETS

MAX_BYTES = 10**6  # maximum size of a config file


class _ConfigFileParser(flags.ArgumentParser):
    """ml_collections' parser, extended to presets and to files that return a Config."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: str) -> Any:
        name, *rest = argument.split(":", 1)
        preset = PRESETS.get(name)
        config = preset.make(*rest) if preset else self._parser.parse(argument)
        return to_config_dict(config).lock() if isinstance(config, Config) else config

    def flag_type(self) -> str:
        return self._parser.flag_type()


def define_config(
    flag_values: flags.FlagValues, argv: Sequence[str] | None = None, told: str = ""
) -> flags.FlagHolder:
    """Define the flag --config=FILE_OR_PRESET[:ARGUMENT] and, once it is parsed, a flag for every
    key. argv: None for the command line. told: the flag's help."""
    holder = config_flags.DEFINE_config_file(
        "config", None, told, flag_values=flag_values, sys_argv=argv
    )
    flag_values["config"].parser = _ConfigFileParser(flag_values["config"].parser)
    return holder


def read_config(file: str, overrides: Sequence[str] = (), flag: str = "--config") -> Config:
    """Read FILE_OR_PRESET[:ARGUMENT] and apply overrides `--config.KEY=VALUE`.

    Raises ConfigError with all mistakes in the file, the overrides and the resulting config. flag:
    the name of the file's argument, for messages.
    """
    made = load(file, flag)
    mistakes = Mistakes()
    good: list[str] = []
    for words in _grouped(overrides):
        try:
            _parse(file, words)
            good += words
        except Exception as error:  # ml_collections raises many types
            mistakes.add(_told(words[0], error, made))
    config = None
    with mistakes.gather():
        try:
            config = from_config_dict(_parse(file, good))
        except UserError:
            raise
        except flags.Error as error:  # raised by several overrides together
            raise ConfigError(f"{flag}: {one_line(error)}") from None
        except Exception as error:  # raised by ml_collections for the file's result
            raise ConfigError(f"{flag}: {file[:200]}: {_cause(error)}") from None
    mistakes.tell()
    assert config
    return config


def load(file: str, flag: str = "--config") -> ml_collections.ConfigDict:
    """The ConfigDict that get_config([ARGUMENT]) of FILE[:ARGUMENT], or of a preset, returns.
    Raises ConfigError if there is neither; if get_config raises, with the line in the file."""
    path, colon, argument = file.partition(":")
    told = f"{flag}: {path[:200]}"
    preset = PRESETS.get(path)
    if not preset:
        _require_file(path, file, flag)
    arguments = [argument] if colon else []
    try:
        make = preset.make if preset else getattr(_module(path), "get_config", None)
        if not callable(make):
            raise ConfigError(f"{told} has no function get_config; see configs/ for examples")
        _require_arguments(make, arguments, told)
        config = make(*arguments)
        if isinstance(config, Config):
            config = to_config_dict(config)
        require_tree(config)
    except UserError as error:
        where = "" if str(error).startswith(flag) else f"{told}{_place(path, error)}: "
        raise ConfigError(f"{where}{error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # config files may raise anything
        raise ConfigError(f"{told}{_place(path, error)}: {_cause(error)}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{told}: get_config returns {type(config).__name__}, not a Config or ConfigDict;"
            " return Config(...)"
        )
    return config


def _require_file(path: str, file: str, flag: str) -> None:
    """Raise ConfigError for a path that cannot be a config file, suggesting presets for a single
    word."""
    try:
        if not path:
            raise ConfigError(f"{flag}={file!r}: names no file")
        if Path(path).is_dir():
            raise ConfigError(
                f"{flag}: {path[:200]} is a directory; name a config file, such as configs/demo.py"
            )
        if not Path(path).is_file():
            is_word = not {"/", "."} & set(path)
            if Path(f"{path}.py").is_file():
                raise ConfigError(f"{flag}: no file {path[:200]}; did you mean {path[:200]}.py?")
            hint = f", and no preset; {suggest(path, PRESETS)}" if is_word else ""
            raise ConfigError(f"{flag}: no file {path[:200]}{hint}")
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise ConfigError(
                f"{flag}: {path[:200]}: {size} bytes; too large for a config file; name another"
            )
    except (OSError, ValueError) as error:  # such as a name that is too long or contains a NUL
        raise ConfigError(f"{flag}: {path[:200]!r}: {one_line(error)[:100]}") from None


def _module(path: str) -> object:
    loader = SourceFileLoader("btx_jax_config_file", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _require_arguments(make: object, arguments: list[str], told: str) -> None:
    try:
        inspect.signature(make).bind(*arguments)  # type: ignore[arg-type]
    except TypeError:
        cure = "takes no argument; leave out the colon and what follows"
        if not arguments:
            cure = "needs an argument; write FILE:ARGUMENT"
        raise ConfigError(f"{told}: argument of get_config: {cure}") from None


def _place(path: str, error: BaseException) -> str:
    """The error's line in the config file, as ", line N"; "" if unknown."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename == path:
        return f", line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {frames[-1].lineno}" if frames else ""


def _cause(error: BaseException) -> str:
    try:
        words = one_line(error.msg if isinstance(error, SyntaxError) else error)
    except Exception:  # raised by an exception class defined in the file
        words = ""
    if isinstance(error, dataclasses.FrozenInstanceError):
        words += " of a Config; change its to_config_dict(...) and return that"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _grouped(overrides: Sequence[str]) -> list[list[str]]:
    """Group overrides with their values: `--config.a=1` alone, `--config.a 1` together."""
    groups: list[list[str]] = []
    for word in overrides:
        if groups and not word.startswith("-") and "=" not in groups[-1][0]:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _parse(file: str, words: Sequence[str]) -> ml_collections.ConfigDict:
    argv = ["btx_jax", f"--config={file}", *words]
    parsed = flags.FlagValues()
    define_config(parsed, argv)
    parsed(argv)
    return parsed["config"].value


def _told(word: str, error: Exception, config: ml_collections.ConfigDict) -> str:
    if isinstance(error, flags.Error):
        return one_line(error).removeprefix("flag --")
    key = word.partition("=")[0].removeprefix("--")
    if hint := re.search(r"Did you mean .*\?", str(error)):
        return f"{key}: unknown key; {hint[0]}"
    within: object = config
    for name in key.split(".")[1:]:
        if not isinstance(within, ml_collections.ConfigDict):
            return f"{key}: unknown key; there are no keys below {key.rpartition('.')[0]}"
        if name not in within:
            return f"{key}: unknown key; {suggest(name, within)}"
        within = within[name]
    return f"{key}: {one_line(error)}"
