"""Sources of text: files, tensorflow_datasets, and the demo corpora.

Wherever a config names text, the notation is comma-separated `WHAT[#FIELD][:WEIGHT]`. WHAT is a
file, a glob, `gs://BUCKET/GLOB`, `hf://datasets/org/name[@REVISION]/GLOB`, `tfds:NAME[/CONFIG]` or
`demo:NAME`; environment variables are expanded. FIELD is the text's field where rows have fields,
as in JSON lines, CSV, Parquet and tfds ("text" if absent); `meta.text` is the field `text` of the
field `meta`.
"""

import dataclasses
import glob
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from btx_jax.buckets import is_url
from btx_jax.data import bucket_files, corpora
from btx_jax.data.files import File, Problem, Row, find_field, read_rows, shown_fields
from btx_jax.data.hub_files import find_files, is_on_hub
from btx_jax.errors import UserError, suggest
from btx_jax.paths import expand

TEXT = "text"  # default field of the text


@dataclasses.dataclass(frozen=True)
class Source:
    """One weighted source of text. where: a path, a glob, gs://..., hf://..., tfds:NAME or
    demo:NAME."""

    where: str
    field: str = TEXT
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Domain:
    name: str
    sources: tuple[Source, ...]
    weight: float = 1.0


def parse_sources(notation: str, key: str) -> tuple[Source, ...]:
    """Parse a notation. Raises UserError, naming the config key, for an empty list, an empty entry
    or a weight of 0."""
    sources = []
    for entry in notation.split(","):
        where, weight = _split_weight(entry.strip(), key)
        where, _, field = where.partition("#")
        where = where if is_on_hub(where) else expand(where, key)
        sources.append(Source(where, field or TEXT, weight))
    return tuple(sources)


def _split_weight(entry: str, key: str) -> tuple[str, float]:
    if not entry:
        raise UserError(f"{key}: no text given; name a domain, files, tfds:NAME or demo:NAME")
    match = re.fullmatch(r"(.+?):([0-9]+(?:\.[0-9]+)?)", entry)
    where, weight = (match[1], float(match[2])) if match else (entry, 1.0)
    if weight == 0:
        raise UserError(f"{key}: {where} has weight 0; leave it out")
    return where, weight


def parse_domains(notation: str, domains: Mapping[str, str], key: str) -> tuple[Domain, ...]:
    """Names from `domains` become those domains; all other entries together become one domain,
    `text`, with the sum of their weights. Raises UserError, with the nearest name, for a word that
    is neither a domain nor a file."""
    named, loose = [], []
    for entry in notation.split(","):
        where, weight = _split_weight(entry.strip(), key)
        if where in domains:
            named.append(
                Domain(where, parse_sources(domains[where], f"config.data.domains.{where}"), weight)
            )
        elif domains and re.fullmatch(r"[\w-]+", where) and not os.path.exists(where):
            raise UserError(
                f"{key}: {where!r} is neither a domain nor a file; {suggest(where, domains)}"
            )
        else:
            loose.append(entry)
    if loose:
        sources = parse_sources(",".join(loose), key)
        named.append(Domain("text", sources, sum(source.weight for source in sources)))
    return tuple(named)


class Problems:
    """Counts what had to be skipped or truncated, by kind, with the location of the first of each.
    Nothing is dropped without being counted."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, kind: str, place: str, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, place)

    def lines(self) -> list[str]:
        return [
            f"{count} x {kind} (first: {self.first[kind]})" for kind, count in self.counts.items()
        ]


def expand_files(source: Source, key: str = "config.data") -> list[File]:
    """The files of a path or glob, local, on the Hub or in a bucket, sorted. Raises UserError,
    naming the key, when there are none."""
    if is_on_hub(source.where):
        return [*find_files(source.where, key)]
    if is_url(source.where):
        return [*bucket_files.find_files(source.where, key)]
    found = glob.glob(source.where, recursive=True)
    files: list[File] = [*sorted(Path(p) for p in found if os.path.isfile(p))]
    if not files and any(os.path.isdir(p) for p in found):
        folder = source.where.rstrip("/")
        raise UserError(
            f"{key}: {source.where!r} is a directory; name its files, such as '{folder}/*.jsonl'"
        )
    if not files:
        raise UserError(f"{key}: no file matches {source.where!r}; {_cure(source.where)}")
    return files


def _cure(where: str) -> str:
    """What to write instead of a path that no file matches."""
    if where.startswith(f"{corpora.DIRECTORY}/"):
        return "`python -m btx_jax.data.corpora` writes it"
    file, _, weight = where.rpartition(":")
    if file and glob.glob(file, recursive=True):
        return f"{weight!r} is not a weight; give a number above 0, as in {file}:2"
    words = re.split("[ ;]+", where.strip())
    if words[1:] and all(glob.glob(word, recursive=True) for word in words):
        return f"separate files by commas: '{','.join(words)}'"
    return "check the path (globs are allowed; quote them in a shell)"


def source_rows(source: Source, files: Iterable[File]) -> Iterator[Row]:
    """Yield all rows of a source. files: its files, unless it is a tensorflow_datasets set. Only
    the source's field is read, unless it names a format."""
    field = None if source.field.startswith("@") else source.field
    if source.where.startswith("tfds:"):
        yield from tfds_rows(source.where.removeprefix("tfds:"), field)
        return
    for file in files:
        row = None
        for row in read_rows(file, field):
            if isinstance(row.value, str) and source.field != TEXT:
                raise UserError(f"{file} is plain text without fields; leave #{source.field} out")
            yield row
        if row is None:
            yield Row(str(file), Problem("file without documents"))


def documents(rows: Iterable[Row], field: str, problems: Problems) -> Iterator[tuple[str, str]]:
    """(location, text) of rows. Those without a usable text (unreadable, field missing or not text,
    invalid Unicode, empty) are counted in `problems`."""
    for place, value in rows:
        text = _text(value, field)
        if isinstance(text, Problem):
            problems.add(text.kind, f"{place}, {text.detail}" if text.detail else place)
        else:
            yield place, text


def _text(value: Any, field: str) -> str | Problem:
    if isinstance(value, Problem):
        return value
    if isinstance(value, Mapping):
        try:
            value = find_field(value, field)
        except KeyError:
            told = f"which has: {shown_fields(value)}; name the field as FILE#FIELD"
            return Problem(f"document skipped: no field {field!r}", told)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return Problem("document skipped: invalid UTF-8", f"byte {error.start}")
    if not isinstance(value, str):
        return Problem(f"document skipped: field {field!r} is not text", type(value).__name__)
    if not is_unicode(value):
        return Problem("document skipped: not valid Unicode")
    return value if value.strip() else Problem("document skipped: empty")


def is_unicode(text: str) -> bool:
    """Whether a text is free of lone surrogates, which no tokenizer accepts. They come from JSON,
    which can contain them, or stand for bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_documents(file: File, field: str, problems: Problems) -> Iterator[str]:
    """Yield the text of every document in the file, in order; rows without text are counted in
    `problems`. Raises UserError when the file itself is damaged."""
    rows = source_rows(Source(str(file), field), [file])
    return (text for _, text in documents(rows, field, problems))


def read_json_lines(
    path: str, key: str, limit: int = 0, max_bytes: int = 0
) -> list[dict[str, Any]]:
    """The rows of a file with fields (JSON lines, a JSON array, CSV, Parquet), at most `limit`, 0
    for all. max_bytes: limit of their total size as JSON, 0 for none. Raises UserError, naming the
    key and the location, for the first that cannot be read."""
    file = _one_file(path, key)
    items: list[dict[str, Any]] = []
    size = 0
    for place, value in read_rows(file):
        if limit and len(items) == limit:
            break
        if isinstance(value, Problem):
            raise UserError(f"{key}: {place}: {value.kind} ({value.detail})")
        if isinstance(value, str):
            raise UserError(f"{key}: {place} is plain text; give it as JSON lines, CSV or Parquet")
        told = json.dumps(value, ensure_ascii=False, default=str)
        if not is_unicode(told):
            raise UserError(f"{key}: {place}: not valid Unicode")
        size += len(told)
        if max_bytes and size > max_bytes:
            raise UserError(f"{key}: {file} is larger than {max_bytes >> 20} MiB; split it")
        items.append(dict(value))
    return items


def _one_file(path: str, key: str) -> File:
    if is_on_hub(path) or is_url(path):
        first, *others = (find_files if is_on_hub(path) else bucket_files.find_files)(path, key)
        if others:
            raise UserError(f"{key}: {path} names {len(others) + 1} files; name one of them")
        return first
    file = Path(expand(path, key))
    if not file.is_file():
        raise UserError(f"{key}: no file {file}")
    return file


def tfds_rows(name: str, field: str | None) -> Iterator[Row]:
    """Rows of the train split of a tensorflow_datasets data set, through `tfds.data_source`, which
    does not need TensorFlow. field: the field needed, None for any. Raises UserError when it is
    missing."""
    import tensorflow_datasets as tfds

    # By itself, tfds registers all kinds in turn and stops at the first that lacks a library:
    # images, which come before any text.
    for kind in ("text", "question_answering", "summarization", "translate"):
        importlib.import_module(f"tensorflow_datasets.{kind}")
    try:
        rows = tfds.data_source(name, split="train")
    except Exception as error:  # tfds raises many types; all mean that the data set is unavailable
        raise UserError(
            f"config.data: tfds:{name} cannot be opened: {str(error).strip().splitlines()[0]}"
        ) from error
    for number, row in enumerate(rows):
        if field is not None and not number:
            try:
                find_field(row, field)
            except KeyError:
                raise UserError(
                    f"tfds:{name} has no field {field!r}; it has: {shown_fields(row)}; name the"
                    f" field as tfds:{name}#FIELD"
                ) from None
        yield Row(f"tfds:{name}, row {number}", row)
