"""Declaration of config sections with their permitted values, and validation that reports all
mistakes at once.

A section is a frozen dataclass that subclasses `Section`. `Annotated[int, Range(1, 10)]` bounds a
number, and `Annotated[str, Choice(...)]` lists the permitted words; both also work inside
`tuple[...]` and `Mapping[str, ...]`. A method marked `@rule` yields mistakes that concern several
fields.
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from btx_jax.errors import Mistakes, one_of, suggest

T = TypeVar("T")

MAX_TEXT = 100_000  # characters of a string
MAX_NAMES = 10_000  # entries of a mapping or of a list
MAX_UNKNOWN = 10  # unknown keys of a section to list by name
HUGE = 1e30  # upper bound for floats that have no other: float32 ends at 3e38


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, inclusive unless `above` (excludes low) or `below` (excludes high);
    never NaN or infinity. also: one further permitted number."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: int | None = None

    def problem(self, value: float) -> str:
        """What the value must be, if it is out of range; else ""."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if (low and high) or value == self.also:
            return ""
        finite = isinstance(value, int) or math.isfinite(value)
        if self.high <= 1:
            brackets = "(" if self.above else "[", ")" if self.below else "]"
            return f"must lie in {brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"
        if finite and low:
            return f"must be at most {self.high:.15g}"
        if self.above and not self.low:
            return "must be positive and finite"
        if not finite:
            return "must be finite"
        other = "" if self.also is None else f", or {self.also}"
        return (f"must be at least {self.low:g}" if self.low else "must not be negative") + other


@dataclass(frozen=True)
class Choice:
    """A list of permitted words. empty: whether "" is permitted too."""

    words: tuple[str, ...]
    empty: bool = False


# The usual kinds of numbers.
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Experts = Annotated[int, Range(1, 4096)]
Share = Annotated[float, Range(0, 1, below=True)]  # below 1
Fraction = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, HUGE, above=True)]
Weight = Annotated[float, Range(0, 1e3)]  # weight of a loss term


class Section:
    """A section that validates itself on construction. Raises ConfigError with a line for every
    mistake."""

    def __post_init__(self) -> None:
        mistakes = Mistakes()
        _known(type(self), vars(self), "", mistakes)
        mistakes.tell()


def rule(method: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    """Mark a method that validates several fields of a section together. It yields lines that start
    with a key, and reads only fields of `self`. If one of those fields is invalid on its own, the
    rule is skipped."""
    method.is_rule = True  # type: ignore[attr-defined]
    return method


class Unknown(Exception):
    """Raised when a rule reads a field that is missing or invalid on its own."""


class _Known:
    """The valid fields of a section; passed to its rules as `self`."""

    def __init__(self, fields: Mapping[str, Any]):
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise Unknown(name)


def is_missing(section: Any, name: str) -> bool:
    """For rules: whether an optional field is omitted, rather than invalid."""
    try:
        return getattr(section, name) is None
    except Unknown:
        return False


def from_dict(cls: type[T], values: Mapping[str, Any], key: str = "config") -> T:
    """Strict conversion of a dict to a dataclass. Raises ConfigError with every unknown, missing,
    mistyped and invalid value."""
    mistakes = Mistakes()
    made = _section(cls, values, key, mistakes)
    mistakes.tell()
    assert made is not None
    return made


def shown(value: Any) -> str:
    """A value as one short line for a message; long strings and containers are abbreviated."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = self.maxdict = 10

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def _section(cls: type[T], values: Any, key: str, mistakes: Mistakes) -> T | None:
    """The section made from `values`; None when there are mistakes."""
    if not isinstance(values, Mapping):
        mistakes.add(f"{key}={shown(values)}: must be a section (a mapping of keys to values)")
        return None
    before = len(mistakes.found)
    known = _known(cls, values, f"{key}.", mistakes)
    if len(mistakes.found) > before:
        return None
    with mistakes.gather(f"{key}."):
        return cls(**{name: known[name] for name in values if name in known})
    return None


def _known(cls: type, values: Mapping[str, Any], prefix: str, mistakes: Mistakes) -> dict[str, Any]:
    """The valid fields, including defaults; mistakes, including those found by rules, are added to
    `mistakes`."""
    fields, hints, rules = _declared(cls)
    unknown = [name for name in values if name not in fields]
    for name in unknown[:MAX_UNKNOWN]:
        mistakes.add(f"{prefix}{str(name)[:200]}: unknown key; {suggest(name, fields)}")
    if len(unknown) > MAX_UNKNOWN:
        mistakes.add(f"{prefix}*: {len(unknown) - MAX_UNKNOWN} more unknown keys")
    known: dict[str, Any] = {}
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            if values.get(name) is None:
                mistakes.add(f"{prefix}{name}: missing")
                continue
        elif name not in values:
            made = f.default_factory is not dataclasses.MISSING
            known[name] = f.default_factory() if made else f.default
            continue
        before = len(mistakes.found)
        value = _convert(hints[name], values[name], f"{prefix}{name}", mistakes)
        if len(mistakes.found) == before:
            known[name] = value
    for method in rules:
        try:
            for line in method(_Known(known)):
                mistakes.add(line if line.startswith("config.") else prefix + line)
        except Unknown:
            pass  # the field is already among the mistakes
    return known


@functools.cache
def _declared(cls: type) -> tuple[dict[str, Any], dict[str, Any], list[Callable]]:
    """(fields, their types, rules)."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    rules = [method for method in vars(cls).values() if getattr(method, "is_rule", False)]
    return fields, typing.get_type_hints(cls, include_extras=True), rules


def _convert(hint: Any, value: Any, key: str, mistakes: Mistakes) -> Any:
    """The value converted to its type; meaningless when a mistake was added."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only ever `Section | None`
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key, mistakes)
    if dataclasses.is_dataclass(hint):
        is_made = isinstance(value, hint)  # type: ignore[arg-type]
        return value if is_made else _section(hint, value, key, mistakes)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(args[0], value, key, mistakes)
    if origin is Mapping:
        return _convert_mapping(args[1], value, key, mistakes)
    bounds: tuple[Any, ...] = ()
    if origin is Annotated:
        hint, *bounds = args  # type: ignore[assignment]
    if problem := _problem(hint, value, bounds):
        mistakes.add(f"{key}={shown(value)}: {problem}")
        return value
    for bound in bounds:
        if isinstance(bound, Choice) and not (bound.empty and not value):
            with mistakes.gather():
                one_of(key, value, bound.words)
    return float(value) if hint is float else value


def _problem(kind: type, value: Any, bounds: Any) -> str:
    if value is None:
        return f"must be {kind.__name__}, not None; leave the key out for its default"
    wanted: Any = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        return f"must be {kind.__name__}, not {type(value).__name__}"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"has {len(value)} characters, but at most {MAX_TEXT} are allowed"
    if kind is float and not bounds and abs(value) >= 2**1023:
        return "must be finite"
    return next((p for b in bounds if isinstance(b, Range) and (p := b.problem(value))), "")


def _convert_tuple(kind: Any, value: Any, key: str, mistakes: Mistakes) -> Any:
    if isinstance(value, str):
        mistakes.add(f"{key}={shown(value)}: must be a list; write ({shown(value)},)")
    elif not isinstance(value, tuple | list):
        mistakes.add(f"{key}={shown(value)}: must be a list")
    elif len(value) > MAX_NAMES:
        mistakes.add(f"{key}: {len(value)} entries, but at most {MAX_NAMES} are allowed")
    else:
        return tuple(
            _convert(kind, item, f"{key}[{i}]" if len(value) > 1 else key, mistakes)
            for i, item in enumerate(value)
        )
    return value


def _convert_mapping(kind: Any, value: Any, key: str, mistakes: Mistakes) -> Any:
    if not isinstance(value, Mapping):
        mistakes.add(f"{key}={shown(value)}: must map names to values")
    elif len(value) > MAX_NAMES:
        mistakes.add(f"{key}: {len(value)} names, but at most {MAX_NAMES} are allowed")
    elif wrong := [name for name in value if not isinstance(name, str) or not name]:
        mistakes.add(f"{key}: {shown(wrong[0])} is not a name; names are non-empty strings")
    else:
        return {
            name: _convert(kind, item, f"{key}.{name[:200]}", mistakes)
            for name, item in value.items()
        }
    return value
