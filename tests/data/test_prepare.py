import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_jax.config.config import DataConfig
from btx_jax.data.documents import Document, is_heldout, pack, text_document
from btx_jax.data.mixture import heldout_rows, training_batches
from btx_jax.data.prepare import prepare
from btx_jax.data.sentencepiece_models import train_sentencepiece
from btx_jax.data.sources import (
    Problems,
    Source,
    documents,
    parse_domains,
    parse_sources,
    read_documents,
    source_rows,
)
from btx_jax.data.tokenizers import (
    copy_tokenizer,
    load_tokenizer,
)
from btx_jax.errors import UserError
from tests.conftest import sentences


def config(tmp_path, train, **kwargs):
    values = {"sequence_length": 32, "heldout_fraction": 0.2, "cache": str(tmp_path / "cache")}
    return DataConfig(train=str(train), **{**values, **kwargs})


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


class Letters:
    """A tokenizer with one token per character; BOS 1, EOS 2."""

    bos, eos, vocab_size, eos_text, prefix = 1, 2, 300, "", [1]

    def encode(self, text):
        return [ord(c) for c in text]


@given(
    st.lists(st.text(alphabet="abcdefgh", min_size=0, max_size=40), min_size=1, max_size=12),
    st.integers(2, 17),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_exactly_once_and_bytes_add_up(texts, length):
    tokenizer = Letters()
    documents = [(tokenizer.encode(t), len(t)) for t in texts]
    rows = list(pack((Document(*document) for document in documents), tokenizer, length))
    targets = []
    for row in rows:
        assert row["tokens"].shape == row["segments"].shape == (length + 1,)
        mask = (row["segments"][1:] == row["segments"][:-1]) & (row["segments"][1:] > 0)
        targets += row["tokens"][1:][mask].tolist()
    assert targets == [t for ids, _ in documents for t in [*ids, 2]], (
        "a document's tokens and its EOS, in order, once"
    )
    assert sum(int(row["bytes"]) for row in rows) == sum(size for _, size in documents)


def test_heldout_is_disjoint_by_text_even_for_duplicates(tmp_path, tokenizer):
    texts = sentences(120, seed=3)
    file = write(tmp_path / "a.jsonl", texts + texts[:60])
    (domain,) = prepare(str(file), config(tmp_path, file), tokenizer, "config.data.train")
    manifest = domain.sources[0].manifest
    assert sum(split["documents"] for split in manifest["splits"].values()) == 180
    train = " ".join(
        tokenizer.decode(row["tokens"].tolist()) for row in domain.sources[0].open("train")
    )
    heldout = [t for t in texts if is_heldout(t, 0.2)]
    assert 10 < len(heldout) < 40
    for text in heldout:
        assert text.split(". ")[0] + "." not in train, "a held-out document is trained on"
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert len(manifest["files"][0]["sha256"]) == 64
    rows = heldout_rows(domain)
    assert rows["bytes"].sum() == manifest["splits"]["heldout"]["bytes"]
    assert len(heldout_rows(domain, 3)["tokens"]) == 3
    assert rows["bytes"].sum() == sum(len(t) for t in texts + texts[:60] if is_heldout(t, 0.2))


def test_a_prepared_set_is_found_again_and_changes_with_text_and_tokenizer_settings(
    tmp_path, tokenizer
):
    file = write(tmp_path / "a.jsonl", sentences(40))
    first = prepare(str(file), config(tmp_path, file), tokenizer, "k")[0].sources[0]
    assert (
        prepare(str(file), config(tmp_path, file), tokenizer, "k")[0].sources[0].directory
        == first.directory
    )
    assert (
        prepare(str(file), config(tmp_path, file, sequence_length=16), tokenizer, "k")[0]
        .sources[0]
        .directory
        != first.directory
    )
    write(file, sentences(41))
    assert (
        prepare(str(file), config(tmp_path, file), tokenizer, "k")[0].sources[0].directory
        != first.directory
    )
    assert not [p for p in (tmp_path / "cache" / "packed").iterdir() if p.name.startswith(".")], (
        "temporary folders left behind"
    )


def test_weights_mix_domains_and_resume_is_exact(tmp_path, tokenizer):
    a, b = (
        write(tmp_path / "a.jsonl", ["aaa 111 " * 9] * 40),
        write(tmp_path / "b.jsonl", ["bbb 222 " * 9] * 40),
    )
    c = config(tmp_path, "A:3,B:1", domains={"A": str(a), "B": str(b)}, heldout_fraction=0.0)
    domains = prepare(c.train, c, tokenizer, "k")
    assert [d.name for d in domains] == ["A", "B"]
    batches = training_batches(domains, 8, seed=0)
    seen = [next(batches)["tokens"] for _ in range(40)]
    share = np.mean(["a" in tokenizer.decode(row.tolist()) for batch in seen for row in batch])
    assert share == pytest.approx(0.75, abs=0.03)

    again = training_batches(domains, 8, seed=0)
    for _ in range(11):
        next(again)
    state = json.loads(json.dumps(again.get_state()))
    resumed = training_batches(domains, 8, seed=0)
    resumed.set_state(state)
    for i in range(11, 15):
        np.testing.assert_array_equal(next(resumed)["tokens"], seen[i])
    other = training_batches(domains, 8, seed=1)
    assert not np.array_equal(next(other)["tokens"], seen[0])


def test_hosts_share_each_global_batch(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", sentences(80))
    c = config(tmp_path, file)
    domains = prepare(c.train, c, tokenizer, "k")
    whole = training_batches(domains, 8, seed=0)
    parts = [training_batches(domains, 8, 0, process, 2) for process in range(2)]
    for _ in range(5):
        want = sorted(map(tuple, next(whole)["tokens"].tolist()))
        got = sorted(tuple(row) for part in parts for row in next(part)["tokens"].tolist())
        assert got == want
    single = [training_batches(domains, 2, 0, process, 2) for process in range(2)]  # one row each
    pairs = [[tuple(next(part)["tokens"][0].tolist()) for part in single] for _ in range(4)]
    assert sorted(row for pair in pairs for row in pair) == sorted(
        map(tuple, next(training_batches(domains, 8, 0))["tokens"].tolist())
    )
    with pytest.raises(UserError, match="batch_size=9: not divisible by the 2 processes"):
        training_batches(domains, 9, 0, 0, 2)


def test_notation():
    assert parse_sources("a.txt,b*.jsonl.gz#body:2.5,tfds:c4/en:3.0.1", "k") == (
        Source("a.txt"), Source("b*.jsonl.gz", "body", 2.5), Source("tfds:c4/en:3.0.1"),
    )  # fmt: skip
    domains = parse_domains("math:30.16,x.txt,y.txt:2", {"math": "m.txt:1,n.txt:3"}, "k")
    assert [(d.name, d.weight, len(d.sources)) for d in domains] == [
        ("math", 30.16, 2),
        ("text", 3.0, 2),
    ]
    for wrong, message in (
        ("", "no text given"),
        ("a.txt,,b.txt", "no text given"),
        ("a.txt:0", "a.txt has weight 0"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sources(wrong, "config.data.train")


def read(file, field="text"):
    problems = Problems()
    return list(read_documents(file, field, problems)), problems


def test_unreadable_documents_are_counted_with_their_place(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(
        b'{"text": "good"}\n{"text": "\xff"}\n[1]\n{"text": 5}\n{"text": "  "}\n\n{"other": 1}\nnot'
        b" json\n"
    )
    texts, problems = read(file)
    assert texts == ["good"]
    assert sum(problems.counts.values()) == 6
    assert any("invalid UTF-8 (first: " in line and "line 2" in line for line in problems.lines())
    assert any("no field 'text'" in line for line in problems.lines())


class SmallPoems(tfds.core.GeneratorBasedBuilder):
    """A data set in the form of tensorflow_datasets."""

    VERSION = tfds.core.Version("1.2.3")
    pkg_dir_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"verse": tfds.features.Text(), "n": np.int32}),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": ((i, {"verse": text, "n": i}) for i, text in enumerate(sentences(30, seed=8)))
        }

    def _generate_examples(self):
        raise AssertionError("the split generators hold the examples")


def test_tensorflow_datasets_are_read_by_name_without_tensorflow(tmp_path, tokenizer, monkeypatch):
    SmallPoems(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    real = tfds.data_source
    monkeypatch.setattr(
        tfds, "data_source", lambda name, **kwargs: real(name, data_dir=str(tmp_path), **kwargs)
    )
    c = config(tmp_path, "tfds:small_poems:1.2.3#verse:2")
    (domain,) = prepare(c.train, c, tokenizer, "config.data.train")
    splits = domain.sources[0].manifest["splits"]
    assert splits["train"]["documents"] + splits["heldout"]["documents"] == 30
    assert domain.sources[0].weight == 2
    assert "tensorflow" not in sys.modules
    for wrong, message in (
        ("tfds:small_poems", "no field 'text'; it has: .*verse"),
        ("tfds:nothing_here", "tfds:nothing_here cannot be opened"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(wrong, c, tokenizer, "config.data.train")


def test_text_data_sets_of_tensorflow_datasets_are_known(monkeypatch):
    monkeypatch.setattr(
        tfds,
        "data_source",
        lambda name, split: tfds.builder_cls(name) and [{"question": b"1 + 1?"}],
    )
    for name in ("gsm8k", "wikipedia", "cnn_dailymail", "wmt14_translate"):
        rows = source_rows(Source(f"tfds:{name}", "question"), [])
        assert [text for _, text in documents(rows, "question", Problems())] == ["1 + 1?"]


def test_rows_come_from_every_source_by_its_weight(tmp_path, tokenizer):
    for number, name in enumerate("abc"):
        write(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in sentences(60, seed=number)])
    c = config(
        tmp_path,
        ",".join(
            f"{tmp_path / name}.jsonl:{weight}" for name, weight in (("a", 1), ("b", 3), ("c", 1))
        ),
    )
    (domain,) = prepare(c.train, c, tokenizer, "config.data.train")
    counts = [len(source.open("heldout")) for source in domain.sources]
    whole = heldout_rows(domain)["tokens"]
    few = heldout_rows(domain, 10)["tokens"]
    first = np.cumsum([0, *counts])
    expected = np.concatenate([whole[first[i] : first[i] + n] for i, n in enumerate((2, 6, 2))])
    np.testing.assert_array_equal(few, expected)
    assert len(heldout_rows(domain, 10**6)["tokens"]) == sum(counts), (
        "a source that has given all leaves the rest to the others"
    )


def test_two_processes_prepare_the_same_text_at_once(tmp_path, tokenizer, tokenizer_file):
    file = write(tmp_path / "a.jsonl", sentences(200))
    program = f"""
import os
os.getpid = lambda: 1  # as in two containers
from pathlib import Path
from btx_jax.config.config import DataConfig
from btx_jax.data.prepare import prepare
from btx_jax.data.tokenizers import load_tokenizer
c = DataConfig(train={str(file)!r}, sequence_length=32, heldout_fraction=0.2, cache={str(tmp_path / "cache")!r})
print(len(prepare(c.train, c, load_tokenizer(Path({str(tokenizer_file)!r})), "k")[0].sources[0].open("train")))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    out = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    assert out[0][0] == out[1][0] != ""
    assert [
        p.name for p in (tmp_path / "cache" / "packed").iterdir() if p.name.startswith(".")
    ] == []


def test_an_end_of_text_written_out_is_counted_neither_in_bytes_nor_twice(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.add_tokens([*"abcd ", "\n"])
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    loaded = load_tokenizer(tmp_path)
    end = loaded.eos
    for text, tokens, size in (
        ("ab", 3, 2),
        ("ab<end>", 3, 2),
        ("ab<end>cd", 6, 4),
        ("ab<end>\n", 4, 3),
    ):
        document = text_document(text, loaded)
        (row,) = pack(iter([document]), loaded, 8)
        used = row["tokens"][row["segments"] > 0]
        assert (len(used), document.bytes) == (tokens, size), text
        assert (used == end).sum() == text.count("<end>") + (text in ("ab", "ab<end>cd")), text


def test_a_vocabulary_is_as_large_as_its_largest_id(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 500}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert load_tokenizer(tmp_path).vocab_size == 501


def test_truncated_and_misnamed_files_are_errors(tmp_path):
    whole = gzip.compress(b'{"text": "hello"}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "not.parquet").write_bytes(b"plain text, long enough")
    (tmp_path / "not.jsonl.zst").write_bytes(b"plain text, long enough")
    for name in ("cut.jsonl.gz", "not.jsonl.gz", "not.parquet", "not.jsonl.zst"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_a_file_that_breaks_midway_leaves_nothing_behind(tmp_path, tokenizer):
    whole = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in sentences(4000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read to the end"):
        prepare(str(tmp_path / "cut.jsonl.gz"), config(tmp_path, "x"), tokenizer, "k")
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not left, left


# U+2581 is sentencepiece's sign for a space, and decodes to one.
TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581")


@given(st.text(alphabet=TEXT, max_size=80))
@settings(max_examples=80, deadline=None)
def test_our_sentencepiece_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_files(tmp_path, tokenizer, tokenizer_file):
    copy_tokenizer(tokenizer, tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").sha256 == tokenizer.sha256
    with pytest.raises(UserError, match="exists; delete it"):
        train_sentencepiece(["x"], 300, tokenizer_file)
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "junk.model")


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([], "of 100 pieces on this text: it has no documents, or all are empty; give more text"),
        (
            ["hello world"],
            r"of 100 pieces on this text: its characters and all bytes need 2",
        ),
    ],
)
def test_why_no_tokenizer_can_be_trained_is_told_in_plain_words(tmp_path, texts, told):
    with pytest.raises(UserError, match=told):
        train_sentencepiece(texts, 100, tmp_path / "out.model")
    assert not list(tmp_path.iterdir())


def test_hugging_face_tokenizers_speak_the_same_interface(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sentences(50), trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).bos is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<begin>", "eos_token": {"content": "<end>"}})
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos, loaded.eos) == (0, 1)
    assert loaded.decode(loaded.encode("the river 42 é")) == "the river 42 é"


def test_problems_of_all_sources_are_told_once_a_process_by_kind(tmp_path, tokenizer, caplog):
    files = []
    for name in ("one", "two"):
        files.append(write(tmp_path / f"{name}.jsonl", sentences(20, seed=len(files))))
        with files[-1].open("a") as file:
            file.write('{"other": 1}\n{"text": 7}\n')
    made = config(tmp_path, f"{files[0]},{files[1]}", sequence_length=512)
    prepare(made.train, made, tokenizer, "config.data.train")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told
    assert told[0].startswith("config.data.train: 2 x document skipped: no field 'text'")
    assert f"first: {files[0]}, line 21" in told[0]
    caplog.clear()
    prepare(made.train, made, tokenizer, "config.data.train")
    prepare(str(files[1]), made, tokenizer, "config.data.heldout")
    assert not caplog.records, "another stage reads the same"
