"""Caches of text under damage, kills and full disks."""

import itertools
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from btx_jax.config.config import DataConfig, FormatConfig
from btx_jax.data import prepared as module
from btx_jax.data.mixture import training_batches
from btx_jax.data.prepare import check_text, prepare, texts
from btx_jax.data.prepared import none_heldout
from btx_jax.errors import UserError
from tests.conftest import ROOT, sentences


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(tmp_path, train, **values):
    return DataConfig(
        train=str(train),
        **{"sequence_length": 32, "heldout_fraction": 0.2, "cache": str(tmp_path / "cache")}
        | values,
    )


@pytest.fixture
def made(tmp_path, tokenizer):
    c = config(tmp_path, write(tmp_path / "a.jsonl", sentences(60)))

    def again():
        return prepare(c.train, c, tokenizer, "config.data.train")[0]

    return again


def rows(domain):
    source = domain.sources[0]
    return [row["tokens"].tolist() for split in ("train", "heldout") for row in source.open(split)]


def flip(file, at, bit):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))


def read_or_refusal(made):
    try:
        return rows(made()), None
    except UserError as error:
        return None, str(error)


def test_a_flipped_bit_never_changes_a_row_in_silence(made, caplog):
    directory = made().sources[0].directory.parent
    good, rng = rows(made()), np.random.default_rng(0)
    names = [f.relative_to(directory) for f in sorted(directory.rglob("*")) if f.is_file()]
    assert len(names) == 5
    told = 0
    for name in names:
        for _ in range(5):
            caplog.clear()
            flip(directory / name, rng.integers((directory / name).stat().st_size), rng.integers(8))
            found, refusal = read_or_refusal(made)
            anew = [line for line in caplog.messages if "is damaged" in line]
            if refusal:
                assert name.suffix.startswith(".array_record")
                assert re.match(rf"{directory}: row \d+ .*delete that directory", refusal)
                assert "\n" not in refusal
                shutil.rmtree(directory)
            else:
                assert found == good
                told += len(anew)
                spared = name.suffix.startswith(".array_record") or name.name == "manifest.json"
                assert len(anew) == 1 or spared, "but for padding and white space"
            assert rows(made()) == good
    assert told >= 10


def test_what_is_gone_or_cut_is_made_anew(made, caplog):
    directory = made().sources[0].directory.parent
    good = rows(made())
    for name in ("manifest.json", "rows/features.json", *map(str, directory.glob("rows/*train*"))):
        file = directory / name
        for damage in (file.unlink, lambda file=file: file.write_bytes(file.read_bytes()[:-1])):
            caplog.clear()
            damage()
            assert rows(made()) == good
            assert sum("is damaged" in line for line in caplog.messages) == 1
    assert rows(made()) == good


def test_a_damaged_row_stops_training_with_one_line(made):
    domain = made()
    file = next(domain.sources[0].directory.glob("*train*"))
    flip(file, 150, 3)
    batches = training_batches((made(),), 8, 0)
    with pytest.raises(UserError, match=r"row \d+ cannot be read .*delete that directory"):
        list(itertools.islice(batches, 40))


def test_text_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    file = write(tmp_path / "a.jsonl", sentences(20))
    real = module.PackedText

    def changing(*args, **kwargs):
        with file.open("a") as opened:
            opened.write('{"text": "more"}\n')
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "PackedText", changing)
    c = config(tmp_path, file)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(c.train, c, tokenizer, "k")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


PROGRAM = """
import sys
from btx_jax.config.config import DataConfig
from btx_jax.data.prepare import prepare
from btx_jax.data.tokenizers import load_tokenizer
text, cache, tokenizer = sys.argv[1:]
c = DataConfig(train=text, sequence_length=32, heldout_fraction=0.2, cache=cache)
prepare(c.train, c, load_tokenizer(tokenizer), "config.data.train")
"""


def start(text, cache, tokenizer_file, **kwargs):
    command = [sys.executable, "-c", PROGRAM, str(text), str(cache), str(tokenizer_file)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **kwargs)


def test_what_a_killed_preparation_leaves_is_swept_by_any_other(
    tmp_path, tokenizer, tokenizer_file
):
    packed = tmp_path / "cache" / "packed"
    long = write(tmp_path / "long.jsonl", sentences(20_000))
    process = start(long, tmp_path / "cache", tokenizer_file)
    while process.poll() is None and not list(packed.glob(".*.partial-*/build/*/*")):
        time.sleep(0.01)
    c = config(tmp_path, write(tmp_path / "a.jsonl", sentences(20)))
    prepare(c.train, c, tokenizer, "k")
    assert list(packed.glob(".*.partial-*")), "that of a living process is left alone"
    process.send_signal(signal.SIGKILL)
    process.wait()
    c = config(tmp_path, write(tmp_path / "b.jsonl", sentences(20, seed=1)))
    prepare(c.train, c, tokenizer, "k")
    assert len(list(packed.iterdir())) == 2 and not list(packed.glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer_file):
    def small_files():  # limits file size: writers get the error of a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    text = write(tmp_path / "a.jsonl", sentences(1500))
    process = start(text, tmp_path / "cache", tokenizer_file, preexec_fn=small_files)
    error = process.communicate(timeout=120)[1]
    assert process.returncode and "cannot write " in error.splitlines()[-1], error[-2000:]
    assert "UserError" in error.splitlines()[-1] and "File too large" in error.splitlines()[-1]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_names_are_checked_before_any_text_is_read(tmp_path, tokenizer):
    good = write(tmp_path / "a.jsonl", sentences(20))
    domains = {"math": str(good), "code": str(good), "gone": str(tmp_path / "gone.txt")}
    (tmp_path / "folder").mkdir()
    formats = {"qa": FormatConfig("{q}", "{a}")}
    for train, message in (
        (
            "math,cod",
            "config.data.train: 'cod' is neither a domain nor a file; did you mean 'code'",
        ),
        ("math,gone", "no file matches .*gone.txt"),
        ("math,demo:mth", "no demo corpus 'mth'; did you mean 'math'"),
        (f"math,{good}#@qb", "no format 'qb' .*; known: qa"),
        (f"math,{tmp_path}/folder", r"is a directory; name its files, such as '.*folder/\*"),
    ):
        c = config(tmp_path, train, domains=domains, formats=formats)
        with pytest.raises(UserError, match=message):
            prepare(c.train, c, tokenizer, "config.data.train")
        c = config(tmp_path, "math", heldout=train, domains=domains, formats=formats)
        with pytest.raises(UserError, match=message.replace("data.train", "data.heldout")):
            check_text(c, texts(c))
    assert not (tmp_path / "cache").exists()


def test_why_nothing_is_held_out_names_the_cure_that_helps(tmp_path, tokenizer):
    many = write(tmp_path / "many.jsonl", sentences(12))
    for fraction in (0.0, 0.001):
        c = config(tmp_path, many, heldout_fraction=fraction)
        (domain,) = prepare(c.train, c, tokenizer, "k")
        told = none_heldout(domain)
        assert (
            f"heldout_fraction={fraction:g} holds out none of its 12; set it to at least " in told
        )
        cure = float(told.partition("at least ")[2].split(",")[0])
        c = config(tmp_path, many, heldout_fraction=cure)
        (domain,) = prepare(c.train, c, tokenizer, "k")
        assert domain.sources[0].manifest["splits"]["heldout"]["documents"] == 1
    (tmp_path / "one.txt").write_text("One document of several words. " * 9)
    c = config(tmp_path, tmp_path / "one.txt", heldout_fraction=0.0)
    assert "its text is a single document" in none_heldout(prepare(c.train, c, tokenizer, "k")[0])
    for train, fraction, message in (
        (tmp_path / "one.txt", 0.999999, "everything is held out: its text is a single document"),
        (many, 0.999999, "holds out every document; lower it to less than 0.9"),
    ):
        c = config(tmp_path, train, heldout_fraction=fraction)
        with pytest.raises(UserError, match=message):
            prepare(c.train, c, tokenizer, "k")


def test_a_long_text_has_held_out_documents(tmp_path, tokenizer):
    text = "\n\n".join(sentences(12_000))
    (tmp_path / "book.txt").write_text(text)
    assert len(text) > 2**20
    c = config(tmp_path, tmp_path / "book.txt", sequence_length=2048)
    splits = prepare(c.train, c, tokenizer, "k")[0].sources[0].manifest["splits"]
    assert splits["train"]["documents"] > splits["heldout"]["documents"] > 0
    assert sum(split["bytes"] for split in splits.values()) == len(text), "none of it is lost"


def test_a_manifest_that_still_parses_is_not_believed(made, caplog):
    manifest = made().sources[0].directory.parent / "manifest.json"
    good = json.loads(manifest.read_text())
    for change in (
        {"source": "elsewhere"},
        {"heldout_fraction": 0.3},
        {"splits": good["splits"] | {"train": good["splits"]["train"] | {"rows": 1}}},
        {"problems": []},
    ):
        caplog.clear()
        manifest.write_text(json.dumps(good | change))
        assert made().sources[0].manifest == {k: v for k, v in good.items() if k != "sha256"}
        assert sum("is damaged (manifest.json" in line for line in caplog.messages) == 1
