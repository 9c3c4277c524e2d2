"""Every kind of file as rows. The oracle is what Hugging Face's datasets reads from the same files:
golden/datasets.json, made by datasets_peer.py."""

import bz2
import contextlib
import gzip
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_jax.data import files
from btx_jax.data.files import Problem, read_rows
from btx_jax.data.sources import Problems, Source, read_documents, source_rows
from btx_jax.errors import UserError
from tests.conftest import ROOT
from tests.data.file_kinds import BOM, CHATS, DOCS, FILES, STRINGS, parquet

GOLDEN = json.loads((ROOT / "tests" / "data" / "golden" / "datasets.json").read_text())


@pytest.fixture
def put(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def values(file, field=None):
    return [row.value for row in read_rows(file, field)]


def texts(file, field="text"):
    problems = Problems()
    return list(read_documents(file, field, problems)), problems.lines()


def as_ours(name, row):
    """A row from datasets in our form: datasets adds fields that a row lacks, parses numbers in
    CSV, normalises line ends in plain text and keeps its byte-order mark."""
    if name.endswith(".txt"):
        return row["text"].removeprefix("\ufeff")
    row = {k.replace("Unnamed: 0", ""): v for k, v in row.items()}
    if ".csv" in name or ".tsv" in name:
        return {k: str(v) for k, v in row.items()}
    return {k: v for k, v in row.items() if v is not None or "parquet" in name}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_rows_that_datasets_reads(name, put):
    expected = [as_ours(name, row) for row in GOLDEN[name]]
    found = values(put(name, FILES[name]))
    if name == "whole.txt":
        found = [text.replace("\r\n", "\n") for text in found]
    assert found == expected


@pytest.mark.parametrize("ending", ["gz", "bz2", "zst"])
def test_a_compressed_file_that_is_cut_anywhere_or_goes_on_behind_its_end_is_refused(ending, put):
    def pack(data):
        codec = {"gz": gzip.compress, "bz2": bz2.compress}.get(ending)
        return codec(data) if codec else pyarrow.compress(data, "zstd", asbytes=True)

    first, second = (json.dumps(doc).encode() + b"\n" for doc in DOCS)
    border, whole = len(pack(first)), pack(first) + pack(second)
    assert values(put(f"x.jsonl.{ending}", whole)) == DOCS
    for end in range(1, len(whole)):
        file = put(f"x.jsonl.{ending}", whole[:end])
        if end == border:
            assert values(file) == DOCS[:1], "nothing shows that a whole frame is missing"
        else:
            with pytest.raises(
                UserError, match=r"cannot be read to the end .*; it may be truncated"
            ):
                values(file)
    if ending != "zst":  # has no checksum here
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 0x10
            with contextlib.suppress(UserError):  # a flipped date in a header is not an error
                assert values(put(f"x.jsonl.{ending}", bytes(flipped))) == DOCS
    for more in (b"x", b"more than a few bytes of garbage"):
        with pytest.raises(UserError, match="cannot be read to the end"):
            values(put(f"x.jsonl.{ending}", whole + more))


def test_an_array_that_is_cut_anywhere_or_goes_on_behind_its_end_is_refused(put):
    whole = json.dumps(DOCS, indent=1).encode()
    for end in range(1, len(whole)):
        with pytest.raises(UserError, match=r"x\.json.*it may be truncated"):
            values(put("x.json", whole[:end]))
    for broken, message in (
        (whole + b"x", "has data after the end"),
        (whole.replace(b"},", b"}"), "instead of a comma after item 1"),
        (whole.replace(b'"n"', b"n"), "item 1: not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            values(put("x.json", broken))


item = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
        | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)  # fmt: skip


@given(st.lists(item, max_size=5), st.none() | st.integers(0, 3), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_arrays_are_streamed_wherever_the_blocks_end(tmp_path_factory, rows, indent, block):
    file = tmp_path_factory.mktemp("array") / "x.json"
    file.write_text(json.dumps(rows, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "HEAD", block)
        assert values(file) == rows


def test_objects_over_several_lines(put):
    assert values(put("x.json", json.dumps(DOCS[0], indent=1).encode())) == DOCS[:1]
    both = "\n".join(json.dumps(doc, indent=1) for doc in DOCS).encode()
    assert values(put("x.json", both)) == DOCS


def test_a_bad_line_is_one_bad_line(put):
    good = json.dumps(DOCS[0]).encode()
    for bad in (
        b"not json", b'{"text": "cut', b"[ERROR] of a log", b'{"text": "\xff"}', b"[1]", b"17",
        b'{"text": "\\ud800"}', b'{"text": "x\\udc80"}', b'{"text": null}', b'{"text": [1]}',
        b'{"text": "a",', b'{"text":', b'{"text": "a", "id": 12', b"[" * 100_000, b'{"text": ' + b"9" * 10_000 + b"}",
    ):  # fmt: skip
        for lines in ([good, bad, good], [bad, good, good], [good, good, bad]):
            found, problems = texts(put("x.jsonl", b"\n".join(lines)))
            assert found == ["hello one"] * 2, bad
            assert len(problems) == 1 and problems[0].startswith("1 x "), (bad, problems)


def test_bad_text_costs_one_row_of_any_kind(put):
    bad = b"a\xffb"
    arrow = pyarrow.array([b"good", bad, b"good"], pyarrow.binary())
    string = pyarrow.Array.from_buffers(pyarrow.string(), 3, arrow.buffers())
    cases = {
        "x.json": b'[{"text": "good"}, {"text": "' + bad + b'"}, {"text": "good"}]',
        "y.json": b'[{"text": "good"}, {"text": "\\udfff"}, {"text": "good"}]',
        "x.csv": b"text,n\ngood,1\n" + bad + b",2\ngood,3\n",
        "y.csv": b"text,n\ngood,1\nbad\ngood,3\n",
        "z.csv": b"text,n\ngood,1\nbad,2,3\ngood,3\n",
        "binary.parquet": parquet({"text": arrow}),
        "string.parquet": parquet({"text": string}),
        "dictionary.parquet": parquet({"text": string.dictionary_encode()}),
        "null.parquet": parquet({"text": ["good", None, "good"]}),
    }
    for name, content in cases.items():
        found, problems = texts(put(name, content))
        assert found == ["good", "good"], name
        assert len(problems) == 1 and problems[0].startswith("1 x "), (name, problems)


def test_dates_that_python_has_not_cost_one_row(put, tmp_path):
    days = pyarrow.array([0, 2**31 - 1, 1], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"day": days}), tmp_path / "x.parquet")
    first, bad, last = (row.value for row in read_rows(tmp_path / "x.parquet"))
    assert first["day"].year == last["day"].year == 1970
    assert bad.kind == "row skipped: a value that Python cannot represent"


def test_fields_in_fields(put):
    lines = put("x.jsonl", b'{"meta": {"text": "in"}}\n{"meta.text": "plain"}\n{"meta": 1}\n')
    found, problems = texts(lines, "meta.text")
    assert found == ["in", "plain"]
    assert "no field 'meta.text' (first: " in problems[0] and "which has: meta" in problems[0]
    struct = put("x.parquet", parquet({"meta": [{"text": "in", "n": 1}], "n": [2]}))
    assert texts(struct, "meta.text")[0] == ["in"]
    for field in ("meta.other", "n.text", "other"):
        with pytest.raises(UserError, match=f"no field '{field}'; it has: meta, n"):
            texts(struct, field)


def test_what_is_no_text_is_never_read_as_text(put):
    lines = FILES["lines.jsonl"]
    cases = {
        "x.zip": (b"PK\3\4", "zip is not supported; unpack it"),
        "x.jsonl.xz": (b"\xfd7zXZ\0", "xz is not supported; unpack it"),
        "x.tar.gz": (gzip.compress(b"x"), "tar is not supported; unpack it"),
        "x.XLSX": (b"PK\3\4", "xlsx is not supported; export it"),
        "x.parquet.gz": (gzip.compress(FILES["strings.parquet"]), "Parquet inside gzip"),
        "x.jsonl": (gzip.compress(lines), "it contains gz, which its name does not say"),
        "x.txt": (FILES["strings.parquet"], "it contains parquet"),
        "x.csv": (b"PK\3\4", "it contains zip"),
        "marked.jsonl": (lines.decode().encode("utf-16"), "its encoding is UTF-16"),
        "plain.txt": ("text".encode("utf-16-le"), "its encoding is UTF-16"),
        "big.csv": ("text,n\na,1\n".encode("utf-16-be"), "its encoding is UTF-16"),
        "wide.txt": ("text".encode("utf-32"), "its encoding is UTF-32"),
        "image.txt": (b"text\0\1\2", "binary, not text"),
        "latin.txt": ("é".encode("latin-1"), "invalid UTF-8"),
    }
    for name, (content, message) in cases.items():
        found, problems = texts(put(name, content))
        assert not found and len(problems) == 1 and message in problems[0], (name, problems)
    assert texts(put("LINES.JSONL.GZ", gzip.compress(lines)))[0] == STRINGS


def test_tables_that_cannot_be_trusted_are_refused(put):
    for content, message in (
        (b"body,n\na,1\n", r"no field 'text'; it has: body, n; name the field"),
        (b"text,text\na,b\n", "two columns have the same name"),
        (b'text,n\n"a" b,1\n', "line 2: .*with each quote inside doubled"),
        (b'text,n\n"never closed,1\nb,2\n', "unexpected end of data"),
    ):
        with pytest.raises(UserError, match=message):
            texts(put("x.csv", content))
    long = "a, " * 100_000
    assert texts(put("x.csv", f'text\n"{long}"\n'.encode()))[0] == [long]
    with pytest.raises(UserError, match="plain text without fields; leave #body out"):
        texts(put("x.txt", b"text"), "body")


def test_a_field_beyond_all_bounds_is_refused(put, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    big = json.dumps({"text": "a" * 5000}).encode()
    for name, content in (
        ("x.jsonl", big),
        ("x.json", b"[" + big + b"]"),
        ("x.csv", b"text\n" + b"a" * 5000),
    ):
        with pytest.raises(UserError, match=name):
            texts(put(name, content))


@pytest.mark.parametrize("mark", ["\n\n", "\r\n\r\n", "\n", " ", ""])
def test_a_long_text_is_cut_into_documents_and_none_of_it_lost(mark, put):
    text = mark.join(f"Paragraph {i} é 中 " + "wörd" * 50 for i in range(8000))
    assert len(text.encode()) > files.LONG_TEXT
    for name, content in (
        ("x.txt", BOM + text.encode()),
        ("x.txt.gz", gzip.compress(text.encode())),
    ):
        found, problems = texts(put(name, content))
        assert "".join(found) == text
        sizes = [len(piece.encode()) for piece in found]
        assert all(files.PIECE <= size <= files.LARGEST_PIECE for size in sizes[:-1])
        assert len(problems) == 1 and "split into documents" in problems[0]
        if mark.strip(" "):
            assert all(piece.startswith("Paragraph") for piece in found)
    broken = bytearray(text.encode())
    broken[len(broken) // 2] = 0xFF
    found, problems = texts(put("x.txt", bytes(broken)))
    assert len(found) == len(sizes) - 1 and "1 x document skipped: invalid UTF-8" in problems[1]


def test_a_text_of_ordinary_length_is_one_document(put):
    text = "A line.\n\n" * (files.LONG_TEXT // 9)
    assert texts(put("x.txt", text.encode())) == ([text], [])


def test_chats_are_the_same_from_every_kind(put):
    chats = [CHATS, CHATS, CHATS]
    names = ("chats.json", "chats.jsonl", "chats.parquet")
    assert [values(put(name, FILES[name])) for name in names] == chats


def test_an_empty_file_is_told(put):
    for name in ("x.jsonl", "x.txt", "x.csv", "x.parquet", "x.json"):
        rows = list(source_rows(Source("x"), [put(name, b"")]))
        assert [row.value for row in rows] == [Problem("file without documents")]
