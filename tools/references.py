"""Reference tables in docs/, generated from the code: every key of a config and of a recipe, with
its type, its default, and the docstring below its field.

    python -m tools.references      # rewrites them, between the marks of the pages

`tests/documents/test_pages.py` fails where a page differs from the generated one.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from btx_jax.config.config import Config
from btx_jax.config.ridge import RidgeConfig
from btx_jax.config.schema import HUGE, Choice, Range
from btx_jax.mixing.recipe import ExpertSource, Recipe
from btx_jax.presets.project import Domain, Project

DOCS = Path(__file__).parent.parent / "docs"
END = "<!-- end -->"
UNBOUNDED = 10**6  # larger upper bounds only catch mistakes, and are not shown


def field_docs(section: type) -> dict[str, str]:
    """Field -> the docstring below it in the source. Raises ValueError for a field without one."""
    (declared,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(declared, ast.ClassDef)
    told = {}
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(str(text))):
                told[name] = " ".join(text.split())
    names = [field.name for field in dataclasses.fields(section)]
    if silent := [name for name in names if name not in told]:
        raise ValueError(
            f"{section.__name__}: no string below {', '.join(silent)} says what it means"
        )
    return {name: told[name] for name in names}


def sections(section: type = Config, path: str = "config") -> Iterator[tuple[str, type]]:
    """Yield (path of its keys, dataclass) for a section and all those below it, each once."""
    yield path, section
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        inner, is_named = _section_in(hint)
        if inner is not None and inner is not Config:
            yield from sections(inner, f"{path}.{name}" + (".NAME" if is_named else ""))


def table(section: type, path: str = "") -> str:
    """A table with a row per field. path: of its keys, for links to the sections below; "" for
    none."""
    hints = typing.get_type_hints(section, include_extras=True)
    told = field_docs(section)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        kind = _kind(hints[field.name], f"{path}.{field.name}" if path else "")
        cells = (f"`{field.name}`", kind, _default(field), told[field.name])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def config_reference() -> str:
    parts = []
    for path, section in sections():
        about = " ".join((section.__doc__ or "").split())
        parts.append(f"## {path}\n\n{about}\n\n{table(section, path)}")
    return "\n\n".join(parts)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The page with each table between `<!-- NAME -->` and the next end mark."""
    for name, made in tables.items():
        before, mark, behind = text.partition(f"<!-- {name} -->\n")
        _, end, after = behind.partition(END)
        assert mark and end, f"no marks of {name}"
        text = f"{before}{mark}{made}\n{END}{after}"
    return text


def pages() -> dict[Path, str]:
    """Page -> its generated contents."""
    made = {
        DOCS / "config.md": {"config": config_reference()},
        DOCS / "recipes.md": {
            "recipe": table(Recipe),
            "expert": table(ExpertSource),
            "ridge": table(RidgeConfig),
        },
        DOCS / "your-domains.md": {"project": table(Project), "domain": table(Domain)},
    }
    return {page: with_tables(page.read_text(), tables) for page, tables in made.items()}


def _section_in(hint: Any) -> tuple[type | None, bool]:
    """The dataclass in a field's type, and whether the field holds several by name."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), False
    if origin in (types.UnionType, typing.Union):
        return _section_in(args[0])
    if origin is Mapping:
        return _section_in(args[1])[0], True
    return None, False


def _kind(hint: Any, path: str) -> str:
    """A field's type as text. path: of the key, for a link to the section it holds."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    inner, is_named = _section_in(hint)
    if inner is not None:
        where = f"{path}.NAME" if is_named else path
        if inner is Config:
            where = "config"
        what = f"[section](#{where.replace('.', '').lower()})" if path else "section, below"
        if is_named:
            return f"map of names to {what}s" if path else "map of names to sections, below"
        return what
    if origin is Mapping:
        return f"map of names to {_kind(args[1], path)}"
    if origin is tuple:
        inside = typing.get_args(args[0])[0] if typing.get_origin(args[0]) else args[0]
        return "list of experts, below" if inside is ExpertSource else f"list: {_kind(args[0], '')}"
    bounds: tuple[Any, ...] = ()
    if origin is Annotated:
        hint, *rest = args
        bounds = tuple(rest)
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]
    for bound in bounds:
        if isinstance(bound, Choice):
            shown = ", ".join(f"`{word}`" for word in bound.words)
            return f"{shown}, or empty" if bound.empty else shown
        if isinstance(bound, Range):
            words += _bounds(bound)
    return words


def _bounds(bound: Range) -> str:
    told = []
    if bound.low > -HUGE:
        told.append(f"{'above' if bound.above else 'at least'} {bound.low:g}")
    if bound.high < UNBOUNDED:
        told.append(f"{'below' if bound.below else 'at most'} {bound.high:,g}")
    shown = " and ".join(told)
    if bound.also is not None:
        shown += f", or {bound.also}"
    return f", {shown}" if shown else ""


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, str | tuple | Mapping) and not value:
        return "empty"
    return f"`{value:,g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
