"""Text and test sets on the Hub: which bytes are downloaded."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btx_jax import hub_names
from btx_jax.config.config import DataConfig
from btx_jax.data.hub_files import AHEAD
from btx_jax.data.prepare import prepare
from btx_jax.data.sources import read_json_lines
from btx_jax.errors import UserError
from tests.conftest import sentences


def table(rows=4000, group=2000):
    """A text column next to one that is a hundred times as large."""
    stream = io.BytesIO()
    texts = sentences(rows)
    images = [os.urandom(2000) for _ in range(rows)]
    pq.write_table(pa.table({"text": texts, "image": images}), stream, row_group_size=group)
    return stream.getvalue()


def data(train, **changes):
    return DataConfig(train=train, sequence_length=64, cache="cache", **changes)


def test_of_a_parquet_file_only_the_column_is_fetched(server, tokenizer):
    parquet = table()
    server.add("org/text", {"data/a.parquet": parquet, "b.parquet": b"x"}, "dataset")
    (domain,) = prepare("hf://datasets/org/text/data/*.parquet", data("x"), tokenizer, "train")
    (source,) = domain.sources
    assert sum(s["documents"] for s in source.manifest["splits"].values()) == 4000
    assert server.bodies() < len(parquet) / 5
    fetched = len(server.log)
    prepare("hf://datasets/org/text/data/*.parquet", data("x"), tokenizer, "train")
    assert not [r for r in server.log[fetched:] if "/cdn/" in r.path]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "txt"])
def test_other_text_is_fetched_once(server, tokenizer, ending):
    lines = [json.dumps({"text": text}) for text in sentences(500)]
    text = "\n".join(["text", *(json.dumps(s.strip()) for s in sentences(500))])
    body = (text if ending == "csv" else "\n".join(lines)).encode()
    body = gzip.compress(body) if ending.endswith("gz") else body
    Path("here").write_bytes(body)
    Path("here").rename(f"here.{ending}")
    server.add("org/text", {f"a.{ending}": body}, "dataset").commit({}, "v1")
    (here,) = prepare(f"here.{ending}", data("x"), tokenizer, "train")
    (there,) = prepare(f"hf://datasets/org/text@v1/a.{ending}", data("x"), tokenizer, "train")
    assert there.identity() == here.identity()
    assert sum(r.sent for r in server.log if r.sent >= len(body)) == len(body)


def test_of_a_test_set_only_the_first_items_are_fetched(server):
    lines = [json.dumps({"question": f"{i}", "pad": "x" * 1000}) for i in range(20_000)]
    server.add(
        "org/set", {"test.jsonl": "\n".join(lines).encode(), "x.parquet": table()}, "dataset"
    )
    items = read_json_lines("hf://datasets/org/set/test.jsonl", "config.evaluate.tasks.a.file", 3)
    assert [item["question"] for item in items] == ["0", "1", "2"]
    assert sum(r.sent for r in server.asked("/resolve/")) <= 2 * AHEAD


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("hf://datasets/org/text", "write hf://datasets/org/name/GLOB"),
        ("hf://org/text/a.jsonl", "write hf://datasets/org/name/GLOB"),
        ("hf://datasets/org/text/*.parquet", "matches '*.parquet'; it has a.jsonl"),
        ("hf://datasets/org/texts/a.jsonl", "no data set org/texts that you can see"),
        ("hf://datasets/org/text@v2/a.jsonl", "org/text has no revision 'v2'"),
    ],
)
def test_text_that_is_not_there(server, tokenizer, where, told):
    server.add("org/text", {"a.jsonl": b"{}"}, "dataset")
    with pytest.raises(UserError) as caught:
        prepare(where, data("x"), tokenizer, "config.data.train")
    assert told in str(caught.value)


def test_text_whose_connection_breaks_is_told(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.add("org/set", {"test.jsonl": b'{"a": 1}\n' * 9}, "dataset")
    server.cuts["/resolve/"] = [1] * 100
    with pytest.raises(
        UserError, match=r"org/set was interrupted repeatedly .* run the same command again"
    ):
        read_json_lines("hf://datasets/org/set/test.jsonl", "key")


@pytest.mark.parametrize(
    ("path", "pattern", "does"),
    [
        ("a/b.parquet", "a/*.parquet", True),
        ("a/b/c.parquet", "a/*.parquet", False),
        ("a/b/c.parquet", "a/**/*.parquet", True),
        ("a/c.parquet", "a/**/*.parquet", True),
        ("a/train-01.parquet", "a/train-0[0-3].parquet", True),
    ],
)
def test_globs_are_those_of_a_shell(path, pattern, does):
    assert hub_names.matches(path, pattern) == does
