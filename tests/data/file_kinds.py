"""Small text files of every kind: name -> content. `datasets_peer.py` reads them with Hugging
Face's datasets, the tests with ours."""

import bz2
import gzip
import io
import json

import pyarrow
import pyarrow.parquet

DOCS = [{"text": "hello one", "n": 1}, {"text": 'two, "quoted"\nlines é 中 \U0001f600', "n": 2}]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four"}]},
    {"messages": [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "five"}]},
]
BOM = b"\xef\xbb\xbf"


def _json(value, **kwargs):
    return json.dumps(value, ensure_ascii=False, **kwargs).encode()


def _lines(rows, end=b"\n"):
    return b"".join(_json(row) + end for row in rows)


def parquet(columns, **kwargs):
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), target, **kwargs)
    return target.getvalue()


def _array(values, kind):
    return pyarrow.array(values, kind)


STRINGS = [doc["text"] for doc in DOCS]

FILES = {
    "lines.jsonl": _lines(DOCS),
    "lines.json": _lines(DOCS),
    "lines.ndjson": _lines(DOCS)[:-1],
    "ascii.jsonl": b"".join(json.dumps(doc).encode() + b"\n" for doc in DOCS),
    "bom.jsonl": BOM + _lines(DOCS),
    "crlf.jsonl": _lines(DOCS, b"\r\n") + b"\r\n",
    "separators.jsonl": _lines([{"text": "a\u2028b\u2029c\x85d"}, *DOCS]),
    "array.json": _json(DOCS, indent=2),
    "one_line_array.json": _json(DOCS),
    "array.jsonl": _json(DOCS, indent=1),
    "bom_array.json": BOM + _json(DOCS, indent="\t"),
    "chats.json": _json(CHATS, indent=1),
    "chats.jsonl": _lines(CHATS),
    "lines.jsonl.gz": gzip.compress(_lines(DOCS)),
    "members.jsonl.gz": b"".join(gzip.compress(_lines([doc])) for doc in DOCS),
    "lines.jsonl.bz2": bz2.compress(_lines(DOCS)),
    "streams.jsonl.bz2": b"".join(bz2.compress(_lines([doc])) for doc in DOCS),
    "lines.jsonl.zst": pyarrow.compress(_lines(DOCS), "zstd", asbytes=True),
    "array.json.gz": gzip.compress(_json(DOCS, indent=2)),
    "rows.csv": b'text,n\nhello one,1\n"two, ""quoted""\nlines \xc3\xa9",2\n',
    "bom.csv": BOM + b"text,n\nhello one,1\n",
    "crlf.csv": b'text,n\r\nhello one,1\r\n"two\r\nlines",2\r\n',
    "index.csv": b",text,n\n0,hello one,1\n1,two,2\n",
    "rows.csv.gz": gzip.compress(b"text,n\nhello one,1\n"),
    "rows.tsv": b'text\tn\nhello one\t1\n"two\t""quoted""\nlines"\t2\nsay "hi", all\t3\n',
    "strings.parquet": parquet({"text": STRINGS, "n": [1, 2]}),
    "large.parquet": parquet({"text": _array(STRINGS, pyarrow.large_string())}),
    "view.parquet": parquet({"text": _array(STRINGS, pyarrow.string_view())}),
    "dictionary.parquet": parquet({"text": _array(STRINGS * 2, None).dictionary_encode()}),
    "nulls.parquet": parquet({"text": ["hello one", None, "two"]}),
    "struct.parquet": parquet({"meta": [{"text": "hello one"}, {"text": "two"}]}),
    "chats.parquet": parquet({"messages": [chat["messages"] for chat in CHATS]}),
    "groups.parquet": parquet({"text": [str(i) for i in range(3000)]}, row_group_size=700),
    "whole.txt": "One line.\n\nAnother, é 中.\r\n".encode(),
    "bom.txt": BOM + b"hello one",
}  # fmt: skip
