"""Read text files of any kind (plain text, JSON lines, JSON, CSV, TSV, Parquet) and compression
(gzip, bzip2, Zstandard) as rows. Files are streamed, except plain text that is one document."""

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from btx_jax.data.bucket_files import BucketFile
from btx_jax.data.hub_files import HubFile
from btx_jax.errors import UserError

JSON = ("jsonl", "ndjson", "json")
DELIMITERS = {"csv": ",", "tsv": "\t"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# Extensions of content that is never text, by what the user must do instead.
UNPACK = ("zip", "tar", "tgz", "tbz2", "txz", "7z", "rar", "xz", "lzma", "lz4", "br", "z")
EXPORT = {"xlsx", "xls", "ods", "arrow", "feather", "avro", "orc", "npy", "npz", "pkl", "sqlite"}
EXPORT |= {"db", "pdf", "docx", "doc", "odt", "epub"}
# First bytes of content that is not text -> the extension under which it is read or reported.
MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"PK\3\4": ".zip",
    b"PAR1\x15": ".parquet",
}
UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # tested first: one begins with UTF-16's mark
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
File = Path | HubFile | BucketFile
HEAD = 2**16  # bytes inspected to identify a file's content
BATCH = 1024  # rows of a Parquet file to read at a time
# Plain text longer than the first is not one document: it is split into pieces of at least the
# second length, about 8,000 tokens, and at most the third.
LONG_TEXT, PIECE, LARGEST_PIECE = 2**20, 2**15, 2**17
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
JSON_SPACE = re.compile(r"[ \t\n\r]*")
MAX_SHOWN_FIELDS = 8
MAX_LINE = (
    2**28
)  # bytes of a line, characters of an item or field; guards against decompression bombs


class Problem(NamedTuple):
    """Something that could not be read. kind: the kind of problem; problems of a kind are counted.
    detail: describes this occurrence."""

    kind: str
    detail: str = ""


class Row(NamedTuple):
    """A row of a file. place: its location, for messages. value: the row's fields; for plain text,
    a document; or the problem with it."""

    place: str
    value: Mapping[str, Any] | str | Problem


def read_rows(file: File, field: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file. field: the only field needed, None for all. Rows that cannot be
    read yield a Problem, so that a damaged line costs only that line.

    Raises UserError where the file as a whole is damaged: truncated, not in its format, or, where
    all rows have the same fields (CSV, Parquet), without the field.
    """
    kind, compression = _kind(file)
    if kind in UNPACK or f".{kind}" in COMPRESSIONS:
        yield Row(str(file), Problem(f"file skipped: .{kind} is not supported; unpack it"))
    elif kind in EXPORT:
        told = f"file skipped: .{kind} is not supported; export it as JSON lines, CSV or Parquet"
        yield Row(str(file), Problem(told))
    elif kind == "parquet" and compression:
        told = f"file skipped: Parquet inside {compression} is not supported; unpack it"
        yield Row(str(file), Problem(told))
    elif size_of(file):
        try:
            yield from _parquet_rows(file, field) if kind == "parquet" else _rows(file, kind, field)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"{file}: cannot be read: {error.strerror}") from error
            raise UserError(
                f"{file}: cannot be read to the end ({error}); it may be truncated or damaged,"
                " copy or download it again"
            ) from error


def size_of(file: File) -> int:
    return os.path.getsize(file) if isinstance(file, Path) else file.size


def find_field(row: Mapping[str, Any], field: str) -> Any:
    """The field named `meta.text`, else the field `text` of `meta`. Raises KeyError."""
    if field in row:
        return row[field]
    outer, dot, inner = field.partition(".")
    if dot and isinstance(row.get(outer), Mapping):
        return find_field(row[outer], inner)
    raise KeyError(field)


def shown_fields(fields: Any) -> str:
    names = [str(name) for name in fields]
    return ", ".join(names[:MAX_SHOWN_FIELDS]) + (", ..." if len(names) > MAX_SHOWN_FIELDS else "")


def _kind(file: File) -> tuple[str, str | None]:
    """(extension in lower case, ignoring that of a compression; the compression or None)."""
    name, ending = os.path.splitext(file.name.lower())
    compression = COMPRESSIONS.get(ending)
    return (os.path.splitext(name)[1] if compression else ending)[1:], compression


def _open(file: File) -> BinaryIO:
    """Open a stream that raises EOFError or OSError, instead of just ending, where a compressed
    file is truncated or followed by other data."""
    _, compression = _kind(file)
    if compression == "gzip":
        return gzip.open(_plain(file))  # type: ignore[return-value]
    if compression:
        import pyarrow

        # Not bz2 and zstandard: bz2 ignores data after a stream, zstandard a missing end.
        return io.BufferedReader(pyarrow.input_stream(_plain(file), compression, HEAD), HEAD)
    return file.open("rb") if isinstance(file, Path) else file.open()


def _plain(file: File) -> Any:
    """A path, or a stream if the file has no local path."""
    return str(file) if isinstance(file, Path) else file.open()


def _rows(file: File, kind: str, field: str | None) -> Iterator[Row]:
    with _open(file) as stream:
        head = stream.read(HEAD)
    if problem := _no_utf8(head, file):
        yield Row(str(file), problem)
        return
    with _open(file) as stream:
        if kind in DELIMITERS:
            yield from _table_rows(file, stream, DELIMITERS[kind], field)
        elif kind not in JSON:
            yield from _documents(file, stream)
        elif _a_value_a_line(head):
            yield from _json_lines(file, stream)
        else:
            yield from _json_values(file, stream)


def _no_utf8(head: bytes, file: File) -> Problem | None:
    """Identify a file that does not begin with UTF-8 text; None if it does."""
    for magic, ending in MAGIC.items():
        if head.startswith(magic):
            told = "unpack it" if ending[1:] in UNPACK else f"name it *{ending}"
            return Problem(
                f"file skipped: it contains {ending[1:]}, which its name does not say; {told}"
            )
    nulls = [byte == 0 for byte in head[:4]]
    encoding = None
    if head.startswith(UTF_32) or nulls in ([False, True, True, True], [True, True, True, False]):
        encoding = "UTF-32"
    elif head.startswith(UTF_16) or nulls in ([False, True] * 2, [True, False] * 2):
        encoding = "UTF-16"
    if encoding:
        return Problem(
            f"file skipped: its encoding is {encoding}, not UTF-8",
            f"convert it: iconv -f {encoding} -t UTF-8 {file.name}",
        )
    return None


# JSON


def _a_value_a_line(head: bytes) -> bool:
    """Whether a JSON file has one value per line, rather than one array, or values that span
    several lines. head: its beginning."""
    text = head.decode("utf-8-sig", "replace").lstrip()
    first, newline, rest = text.partition("\n")
    if text[:1] not in ("[", "{"):
        return True
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        if not newline:
            return text[0] == "{"
        # A value continued on the next line breaks off between two tokens; a damaged one breaks off
        # within a token, or is followed by a complete value.
        return error.pos < len(first.rstrip()) or (text[0] == "{" and _is_object(rest))
    except (ValueError, RecursionError):
        return True
    return text[0] == "{" or bool(rest.strip())


def _is_object(text: str) -> bool:
    """Whether the first non-blank line is a JSON object."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(file: File, stream: BinaryIO) -> Iterator[Row]:
    # Splitting bytes ends lines at \n, \r or both, but not at U+2028, which JSON strings may
    # contain.
    blocks = iter(lambda: stream.readline(MAX_LINE + 1), b"")
    lines = itertools.chain.from_iterable(_lines(block, file) for block in blocks)
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield Row(place, Problem("line skipped: invalid UTF-8", f"byte {error.start}"))
        except (ValueError, RecursionError) as error:  # also for a number with thousands of digits
            yield Row(place, Problem("line skipped: not JSON", str(error).splitlines()[0]))
        else:
            yield Row(place, _object(value, "line"))


def _lines(block: bytes, file: File) -> list[bytes]:
    if len(block) > MAX_LINE:
        raise UserError(f"{file}: a line is longer than {MAX_LINE >> 20} MiB; split it")
    return block.splitlines()


def _object(value: Any, noun: str) -> Mapping[str, Any] | Problem:
    if isinstance(value, dict):
        return value
    return Problem(f"{noun} skipped: not an object with fields", f"{type(value).__name__}")


def _json_values(file: File, stream: BinaryIO) -> Iterator[Row]:
    """Yield the items of one array, or of consecutive values.

    Uses the standard library's decoder on a buffer that grows until it holds a whole item: ijson
    reads a lone surrogate as `?` and supports neither NaN nor integers of more than 64 bits.
    Invalid UTF-8 becomes lone surrogates, so that it costs one item.
    """
    text = _Buffer(stream)
    array = text.next() == "["
    text.at += array
    number = 0
    while (mark := text.next()) != ("]" if array else ""):
        if not mark:
            raise UserError(f"{file}: ends within its array; it may be truncated")
        if array and number:
            if mark != ",":
                raise UserError(
                    f"{file}: {mark!r} instead of a comma after item {number} of its array"
                )
            text.at += 1
            text.next()
        number += 1
        place = f"{file}, item {number}"
        try:
            yield Row(place, _object(text.value(), "item"))
        except (ValueError, RecursionError) as error:
            told = f"{getattr(error, 'msg', error)}{'; it may be truncated' if text.ended else ''}"
            raise UserError(f"{place}: not JSON: {told}") from error
    text.at += array
    if text.next():
        raise UserError(f"{file}: has data after the end of its array")


class _Buffer:
    """Text that is read on demand. at: position of the next character."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._step = "", HEAD
        self.at, self.ended = 0, False

    def next(self) -> str:
        """The next character that is not whitespace; "" at the end."""
        while True:
            match = JSON_SPACE.match(self._text, self.at)
            assert match
            self.at = match.end()
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins at the current position. Raises ValueError or RecursionError when
        there is none."""
        while True:
            if len(self._text) - self.at > 2 * MAX_LINE:
                raise ValueError(f"more than {MAX_LINE >> 20} MiB")
            try:
                value, end = self._parse(self._text, self.at)
            except json.JSONDecodeError as error:
                # A string, or the last few characters, may be incomplete.
                goes_on = error.msg.startswith("Unterminated") or error.pos + 10 > len(self._text)
                if not (goes_on and self._more()):
                    raise
            else:
                if end < len(self._text) or not self._more():  # a number may continue
                    self.at, self._step = end, HEAD
                    return value

    def _more(self) -> bool:
        block = self._stream.read(self._step)
        self._text = self._text[self.at :] + self._decode(block, final=not block)
        self.at, self.ended = 0, not block
        self._step *= 2  # so that a long item is parsed a few times, not thousands
        return not self.ended


# Tables


def _table_rows(file: File, stream: BinaryIO, delimiter: str, field: str | None) -> Iterator[Row]:
    """Rows of CSV and TSV as spreadsheets write them: with a header, and quotes where needed."""
    csv.field_size_limit(MAX_LINE)
    # Invalid UTF-8 becomes lone surrogates, so that it costs one row.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next((row for row in reader if row), [])
        if len(set(filter(None, header))) < len(list(filter(None, header))):
            raise UserError(
                f"{file}: two columns have the same name: {shown_fields(header)}; rename one"
            )
        if field is not None and header and field not in header:
            raise _without(field, file, header)
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if len(row) == len(header):
                yield Row(place, dict(zip(header, row, strict=True)))
            elif row:
                told = f"{len(row)} instead of {len(header)}"
                yield Row(place, Problem("row skipped: more or fewer fields than columns", told))
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.line_num}: {error}; a field that contains quotes must be"
            " quoted, with each quote inside doubled"
        ) from error


def _parquet_rows(file: File, field: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    opened = file if isinstance(file, Path) else file.open(in_pieces=True)
    try:
        with pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as table:
            schema = table.schema_arrow
            if field is not None and not _has(schema, field):
                raise _without(field, file, schema.names)
            batches = table.iter_batches(BATCH, columns=None if field is None else [field])
            values = itertools.chain.from_iterable(map(_batch_rows, batches))
            for number, value in enumerate(values, start=1):
                yield Row(f"{file}, row {number}", value)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error


def _batch_rows(batch: Any) -> list[Mapping[str, Any] | Problem]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [Problem("row skipped: invalid UTF-8")]
    except (KeyError, OverflowError, ValueError) as error:  # dates and time zones that Python lacks
        if len(batch) == 1:
            return [Problem("row skipped: a value that Python cannot represent", str(error))]
    return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]


def _has(fields: Any, field: str) -> bool:
    """Whether a pyarrow schema or struct type has a field, named as for `find_field`."""
    import pyarrow

    types = {each.name: each.type for each in fields}
    outer, _, inner = field.partition(".")
    kind = types.get(outer)
    return field in types or (
        kind is not None and pyarrow.types.is_struct(kind) and _has(kind, inner)
    )


def _without(field: str, file: File, fields: Any) -> UserError:
    return UserError(
        f"{file} has no field {field!r}; it has: {shown_fields(fields)}; name the field as"
        " FILE#FIELD"
    )


# Plain text


def _documents(file: File, stream: BinaryIO) -> Iterator[Row]:
    """Yield the file as one document or, if it is long, as several, split between paragraphs. The
    split depends only on the file, so that every run holds out the same text."""
    start = stream.read(LONG_TEXT + 1)
    is_long = len(start) > LONG_TEXT
    start = start.removeprefix(codecs.BOM_UTF8)
    if not is_long:
        yield Row(str(file), _text(start))
        return
    told = (
        f"text longer than {LONG_TEXT >> 20} MiB: split into documents of {PIECE >> 10} KiB or more"
    )
    yield Row(str(file), Problem(f"{told}, at blank lines where possible", "nothing is lost"))
    first = 0
    for piece in _pieces(stream, start):
        yield Row(f"{file}, byte {first}", _text(piece))
        first += len(piece)


def _text(data: bytes) -> str | Problem:
    if b"\0" in data:
        return Problem("document skipped: binary, not text", f"byte {data.index(0)} is 0")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem("document skipped: invalid UTF-8", f"byte {error.start}")


def _pieces(stream: BinaryIO, start: bytes) -> Iterator[bytes]:
    """Split the stream into pieces that together contain all of its bytes."""
    left = start
    while True:
        if len(left) < LARGEST_PIECE and (more := stream.read(LONG_TEXT)):
            left += more
        if len(left) <= 2 * PIECE:
            break
        end = _end_of_piece(left)
        yield left[:end]
        left = left[end:]
    if left:
        yield left


def _end_of_piece(data: bytes) -> int:
    """Where to split: after a blank line, else after a line, else after a space, else between two
    characters."""
    if blank := BLANK_LINE.search(data, PIECE, LARGEST_PIECE):
        return blank.end()
    for mark in (b"\n", b" "):
        if (found := data.find(mark, PIECE, LARGEST_PIECE)) >= 0:
            return found + 1
    end = min(LARGEST_PIECE, len(data))
    ends = (i for i in range(end, end - 4, -1) if i == len(data) or data[i] & 0xC0 != 0x80)
    return next(ends, end)
