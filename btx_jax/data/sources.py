"""Where text comes from: files (text, JSON lines, Parquet), tensorflow_datasets, and the demo
corpora.

Notation, everywhere a config names text: comma-separated `WHAT[#FIELD][:WEIGHT]`. WHAT is a file, a
glob, `tfds:NAME[/CONFIG]` or `demo:NAME`; environment variables are expanded. FIELD is the text's
field in JSON lines, Parquet and tfds ("text" if absent).
"""

import dataclasses
import glob
import gzip
import importlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from btx_jax.errors import UserError
from btx_jax.paths import expand

MAX_SHOWN_FIELDS = 8
MAX_LINE = 2**28  # bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """One weighted place that text comes from. where: a path, a glob, tfds:NAME or demo:NAME."""

    where: str
    field: str = "text"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Domain:
    name: str
    sources: tuple[Source, ...]
    weight: float = 1.0


def parse_sources(notation: str, key: str) -> tuple[Source, ...]:
    """Raises UserError, naming the config key, for an empty list, an empty entry or a weight of
    0."""
    sources = []
    for entry in notation.split(","):
        where, weight = _split_weight(entry.strip(), key)
        where, _, field = where.partition("#")
        sources.append(Source(expand(where, key), field or "text", weight))
    return tuple(sources)


def _split_weight(entry: str, key: str) -> tuple[str, float]:
    if not entry:
        raise UserError(f"{key}: names no text; give a domain, files, tfds:NAME or demo:NAME")
    match = re.fullmatch(r"(.+?):([0-9]+(?:\.[0-9]+)?)", entry)
    where, weight = (match[1], float(match[2])) if match else (entry, 1.0)
    if weight == 0:
        raise UserError(f"{key}: the weight of {where} is 0; leave it out")
    return where, weight


def parse_domains(notation: str, domains: Mapping[str, str], key: str) -> tuple[Domain, ...]:
    """Names from `domains` become those domains; all other entries together are one domain, `text`,
    of their weights together."""
    named, loose = [], []
    for entry in notation.split(","):
        where, weight = _split_weight(entry.strip(), key)
        if where in domains:
            named.append(
                Domain(where, parse_sources(domains[where], f"config.data.domains.{where}"), weight)
            )
        else:
            loose.append(entry)
    if loose:
        sources = parse_sources(",".join(loose), key)
        named.append(Domain("text", sources, sum(source.weight for source in sources)))
    return tuple(named)


class Problems:
    """What had to be left out or cut, counted by kind with the first place of each. Nothing is
    dropped without a count."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, kind: str, place: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, place)

    def lines(self) -> list[str]:
        return [
            f"{count} x {kind} (first: {self.first[kind]})" for kind, count in self.counts.items()
        ]


def expand_files(source: Source, key: str = "config.data") -> list[Path]:
    """The files of a path or glob, sorted. Raises UserError, naming the key, when there are
    none."""
    files = sorted(Path(p) for p in glob.glob(source.where, recursive=True) if os.path.isfile(p))
    if not files:
        raise UserError(
            f"{key}: no file matches {source.where!r}; check the path (globs are allowed,"
            " quote them in a shell)"
        )
    return files


def read_documents(file: Path, field: str, problems: Problems) -> Iterator[str]:
    """The documents of one file: rows of .jsonl and .parquet, the whole file otherwise; .gz and
    .zst are unpacked.

    Documents that cannot be read (invalid UTF-8, not JSON, field missing or not text, empty) are
    counted in `problems`.
    Raises UserError when the file itself is broken: truncated, not in its format, or without the
    field altogether.
    """
    kind = file.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2].lower()
    empty = True
    try:
        if os.path.getsize(file) == 0:
            rows: Iterator[tuple[str, Any]] = iter(())
        elif kind in ("jsonl", "ndjson", "json"):
            rows = _json_rows(file, field, problems)
        elif kind == "parquet":
            rows = _parquet_rows(file, field)
        else:
            rows = iter([(str(file), _open(file).read())])
        for place, value in rows:
            empty = False
            text = _text(value, place, field, problems)
            if text is not None:
                yield text
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError, OSError) as error:
        raise UserError(f"{file}: cannot be read to its end ({error}); is it truncated?") from error
    if empty:
        problems.add("file without documents", str(file))


def read_json_lines(
    path: str, key: str, limit: int = 0, max_bytes: int = 0
) -> list[dict[str, Any]]:
    """The objects of a .jsonl file (also .gz, .zst), at most `limit`, 0 for all. max_bytes: of its
    unpacked lines, 0 for any. Raises UserError, naming the key and the line."""
    file = Path(expand(path, key))
    if not file.is_file():
        raise UserError(f"{key}: no file {file}")
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        for number, line in enumerate(_lines(file), start=1):
            if limit and len(rows) == limit:
                break
            size += len(line)
            if max_bytes and size > max_bytes:
                raise UserError(f"{key}: {file} holds more than {max_bytes >> 20} MiB; split it")
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(
                        f"{key}: {file}, line {number}: {type(row).__name__}, not an object"
                    )
                rows.append(row)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file}, line {number}: {error}") from error
    except (EOFError, OSError, zstandard.ZstdError) as error:
        raise UserError(
            f"{key}: {file} cannot be read to its end ({error}); is it truncated?"
        ) from error
    return rows


def _text(value: Any, place: str, field: str, problems: Problems) -> str | None:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add("document skipped: invalid UTF-8", f"{place}, byte {error.start}")
            return None
    if not isinstance(value, str):
        problems.add(f"document skipped: field {field!r} holds no text", place)
        return None
    if not value.strip():
        problems.add("document skipped: empty", place)
        return None
    return value


def _lines(file: Path) -> Iterator[bytes]:
    """Raises UserError for a line beyond all bounds: a small packed file can hold one that fills
    the memory."""
    with _open(file) as opened:
        while line := opened.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise UserError(f"{file}: a line of more than {MAX_LINE >> 20} MiB is no document")
            yield line


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if file.suffix == ".zst":
        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True)
        )
    return file.open("rb")


def _json_rows(file: Path, field: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(file), start=1):
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            problems.add("document skipped: invalid UTF-8", f"{place}, byte {error.start}")
        except (
            ValueError,
            RecursionError,
        ) as error:  # also numbers of thousands of digits, brackets as deep
            problems.add(
                "document skipped: line is not JSON", f"{place}: {str(error).splitlines()[0]}"
            )
        else:
            if isinstance(row, dict) and field in row:
                yield place, row[field]
            else:
                fields = (
                    ", ".join(list(row)[:MAX_SHOWN_FIELDS])
                    if isinstance(row, dict)
                    else type(row).__name__
                )
                problems.add(
                    f"document skipped: no field {field!r}",
                    f"{place}, which has: {fields}; name the field as FILE#FIELD",
                )


def _parquet_rows(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            fields = ", ".join(table.schema_arrow.names[:MAX_SHOWN_FIELDS])
            raise UserError(
                f"{file} has no field {field!r}; it has: {fields}; name the field as FILE#FIELD"
            )
        row = 0
        for batch in table.iter_batches(columns=[field]):
            column = batch.column(0)
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                column = column.cast(
                    pyarrow.large_binary()
                )  # so that invalid UTF-8 is one document's problem
            for value in column:
                row += 1
                yield f"{file}, row {row}", value.as_py()
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error


def read_tfds(name: str, field: str, problems: Problems) -> Iterator[str]:
    """Documents of the train split of a tensorflow_datasets data set, through `tfds.data_source`:
    TensorFlow is not needed."""
    import tensorflow_datasets as tfds

    # Its own registration goes through all kinds in turn and ends at the first that lacks a
    # library: images, before any text.
    for kind in ("text", "question_answering", "summarization", "translate"):
        importlib.import_module(f"tensorflow_datasets.{kind}")
    try:
        rows = tfds.data_source(name, split="train")
    except Exception as error:  # tfds raises many kinds; all mean that the data set cannot be had
        raise UserError(
            f"config.data: tfds:{name} cannot be opened: {str(error).strip().splitlines()[0]}"
        ) from error
    for number, row in enumerate(rows):
        if field not in row:
            raise UserError(
                f"tfds:{name} has no field {field!r}; it has: {', '.join(row)}; name the field as"
                f" tfds:{name}#FIELD"
            )
        text = _text(row[field], f"tfds:{name}, row {number}", field, problems)
        if text is not None:
            yield text
