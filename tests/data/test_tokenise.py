"""Tokenising in several processes gives the same set as in one, whoever makes its shards."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from btx_jax.config.config import DataConfig, FormatConfig
from btx_jax.data import tokenise
from btx_jax.data.files import Row
from btx_jax.data.prepare import prepare, tokenise_share
from btx_jax.data.tokenised import load_counts
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from tests.conftest import ROOT, sentences


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokenise, "SHARD_CHARACTERS", 4000)
    monkeypatch.setattr(tokenise, "FEW", 2)


def write(path, texts):
    """Write documents with invalid lines between them."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    lines.insert(3, '{"text": 5}\n')
    lines.insert(len(lines) // 2, "no JSON\n")
    lines.append('{"text": "%s"}\n' % ("a long one " * 60))
    path.write_text("".join(lines))
    return path


def config(tmp_path, cache, train, **values):
    usual = {"sequence_length": 32, "heldout_fraction": 0.2, "cache": str(tmp_path / cache)}
    return DataConfig(train=str(train), **usual | values)


def files(cache):
    """Files of the prepared sets: name -> bytes."""
    return {
        str(path.relative_to(cache / "packed")): path.read_bytes()
        for path in (cache / "packed").rglob("*")
        if path.is_file()
    }


def made_in_one(tmp_path, text, tokenizer, monkeypatch, **values):
    """The files of a set that is tokenised in the reading process."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "FEW", 10**6)
        made = config(tmp_path, "one", text, **values)
        prepare(made.train, made, tokenizer, "k")
    return files(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_files(
    tmp_path, tokenizer, monkeypatch, small_shards, workers
):
    text = write(tmp_path / "a.jsonl", sentences(400))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    monkeypatch.setattr(tokenise, "cores", lambda: workers)
    made = config(tmp_path, "several", text)
    (domain,) = prepare(made.train, made, tokenizer, "k")
    assert files(tmp_path / "several") == want
    assert not (tmp_path / "several" / "tokenised").exists()
    assert [kind.partition(":")[0] for kind in domain.sources[0].manifest["problems"]] == [
        "document longer than 32 tokens",
        "document skipped",
        "line skipped",
    ]


def test_formats_are_filled_by_workers(tmp_path, tokenizer, monkeypatch, small_shards):
    items = tmp_path / "items.jsonl"
    rows = [{"q": text, "a": "river"} for text in sentences(300)] + [{"q": "x " * 99, "a": "y"}]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    formats = {"qa": FormatConfig("{q}", "{a}", cutoff=30)}
    values = {"formats": formats, "sequence_length": 64}
    want = made_in_one(tmp_path, f"{items}#@qa", tokenizer, monkeypatch, **values)
    made = config(tmp_path, "several", f"{items}#@qa", **values)
    prepare(made.train, made, tokenizer, "k")
    assert files(tmp_path / "several") == want


def test_shards_depend_on_the_rows_alone():
    rows = [Row("x", "a" * n) for n in (400_000, 700_000, 5, 5)] + [Row("x", {"t": "b"})] * 5000
    shards = list(tokenise.shards_of(iter(rows)))
    assert [len(shard) for shard in shards] == [2, 4096, 906]
    assert [row for shard in shards for row in shard] == rows


PROGRAM = """
import sys
from btx_jax.config.config import DataConfig
from btx_jax.data import tokenise
from btx_jax.data.prepare import prepare
from btx_jax.data.tokenizers import load_tokenizer
tokenise.SHARD_CHARACTERS, tokenise.FEW = 4000, 2
text, cache, tokenizer = sys.argv[1:]
c = DataConfig(train=text, sequence_length=32, heldout_fraction=0.2, cache=cache)
prepare(c.train, c, load_tokenizer(tokenizer), "k")
"""


def test_a_killed_preparation_goes_on_behind_the_last_shard(
    tmp_path, tokenizer, tokenizer_file, monkeypatch, small_shards
):
    text = write(tmp_path / "a.jsonl", sentences(4000))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    command = [sys.executable, "-c", PROGRAM, text, tmp_path / "killed", tokenizer_file]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    shards = tmp_path / "killed" / "tokenised"
    while process.poll() is None and len(list(shards.glob("*/*.npz"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its workers exit at the end of their input
    before = {file.name: file.stat().st_ino for file in shards.glob("*/*.npz")}
    assert len(before) >= 5
    kept = []

    def watched(file):
        if (found := load_counts(file)) and before.get(file.name) == file.stat().st_ino:
            kept.append(file.name)
        return found

    monkeypatch.setattr(tokenise, "load_counts", watched)
    made = config(tmp_path, "killed", text)
    prepare(made.train, made, tokenizer, "k")
    assert files(tmp_path / "killed") == want
    assert set(kept) == set(before)


def test_a_shard_that_is_damaged_is_made_again(tmp_path, tokenizer, monkeypatch, small_shards):
    text = write(tmp_path / "a.jsonl", sentences(400))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    made = config(tmp_path, "hosts", text)
    tokenise_share(made.train, made, tokenizer, "k", (1, 2))
    found = sorted((tmp_path / "hosts" / "tokenised").glob("*/*.npz"))
    assert len(found) > 3
    found[0].write_bytes(b"")
    found[1].write_bytes(found[1].read_bytes()[:-30])
    prepare(made.train, made, tokenizer, "k")
    assert files(tmp_path / "hosts") == want


def test_hosts_share_the_shards_of_a_source(tmp_path, tokenizer, monkeypatch, small_shards):
    text = write(tmp_path / "a.jsonl", sentences(800))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    made = config(tmp_path, "hosts", text)
    own = []
    send = tokenise.send

    def noted(stream, value):
        if len(value) == 2:
            own.append((threading.current_thread(), value[0].name))
        send(stream, value)

    monkeypatch.setattr(tokenise, "send", noted)
    other = threading.Thread(target=tokenise_share, args=(made.train, made, tokenizer, "k", (1, 2)))
    other.start()
    prepare(made.train, made, tokenizer, "k", hosts=2)
    other.join()
    assert files(tmp_path / "hosts") == want
    names = [name for _, name in own]
    assert len(names) == len(set(names)), "no shard twice"


def test_what_a_silent_host_leaves_is_made_by_the_first(
    tmp_path, tokenizer, monkeypatch, small_shards, caplog
):
    text = write(tmp_path / "a.jsonl", sentences(400))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    monkeypatch.setattr(tokenise, "SILENCE", 0.5)
    made = config(tmp_path, "hosts", text)
    prepare(made.train, made, tokenizer, "k", hosts=2)
    assert files(tmp_path / "hosts") == want
    assert "other hosts are not responding" in caplog.text


def test_errors_of_workers_and_of_the_reader_are_one_line_and_leave_nothing(
    tmp_path, tokenizer, monkeypatch, small_shards
):
    text = write(tmp_path / "a.jsonl", sentences(400))
    made = config(tmp_path, "cache", text)

    def expect(message):
        with pytest.raises(UserError, match=message) as raised:
            prepare(made.train, made, tokenizer, "k")
        assert "\n" not in str(raised.value)

    with monkeypatch.context() as patch:
        patch.setattr("btx_jax.data.sources.read_rows", broken)
        expect("breaks off")
        assert not list((tmp_path / "cache").glob("*/*"))
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "receive", lambda stream: UserError("crashed on a text"))
        expect("crashed on a text")
        assert not list((tmp_path / "cache").glob("*/*"))
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "send", kill_after(5))
        expect("a tokenising process ended with status")
    assert list((tmp_path / "cache" / "tokenised").glob("*/*.npz")), "and all so far is kept"
    prepare(made.train, made, tokenizer, "k")


def broken(file, field):
    from btx_jax.data.files import read_rows

    for number, row in enumerate(read_rows(file, field)):
        if number == 300:
            raise UserError("breaks off")
        yield row


def kill_after(count):
    real, sent = tokenise.send, []

    def send(stream, value):
        sent.append(value)
        if len(sent) > count:
            raise BrokenPipeError
        real(stream, value)

    return send


def test_workers_import_no_jax_and_get_the_same_tokenizer(tokenizer):
    program = "import sys; import btx_jax.data.tokenise_worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jax", "tensorflow_datasets"} & set(done.stdout.split())
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256


def test_special_tokens_in_a_text_are_read_alike_after_pickling(tokenizer_file):
    loaded = load_tokenizer(tokenizer_file)
    for verbatim in (False, True):
        loaded._tokenizer.encode_special_tokens = verbatim
        again = pickle.loads(pickle.dumps(loaded))
        assert again._tokenizer.encode_special_tokens == verbatim
        assert again.encode("a</s>b") == loaded.encode("a</s>b")


def test_shards_left_for_long_are_swept(tmp_path, tokenizer):
    left = tmp_path / "cache" / "tokenised" / "0123"
    left.mkdir(parents=True)
    long_ago = time.time() - tokenise.STALE - 60
    made = config(tmp_path, "cache", write(tmp_path / "a.jsonl", sentences(40)))
    prepare(made.train, made, tokenizer, "k")
    assert left.exists(), "it may be gone on with"
    os.utime(left, (long_ago, long_ago))
    made = config(tmp_path, "cache", write(tmp_path / "b.jsonl", sentences(40)))
    prepare(made.train, made, tokenizer, "k")
    assert not left.parent.exists()


TOGETHER = """
import sys
from btx_jax.parallel import hosts
hosts.start()
from btx_jax.config.config import DataConfig
from btx_jax.data import tokenise
from btx_jax.data.prepare import prepare_by_all
from btx_jax.data.tokenizers import load_tokenizer
tokenise.SHARD_CHARACTERS, tokenise.FEW = 4000, 2
text, cache, tokenizer = sys.argv[1:]
made, note = [], tokenise.Shards._note
tokenise.Shards._note = lambda self, number, result: (made.append(number), note(self, number, result))
c = DataConfig(train=text, sequence_length=32, heldout_fraction=0.2, cache=cache)
(domain,) = prepare_by_all(c.train, c, load_tokenizer(tokenizer), "k")
print(len(made), len(domain.sources[0].open("train")))
"""


def test_two_processes_of_a_run_tokenise_half_each(
    tmp_path, tokenizer, tokenizer_file, monkeypatch, small_shards
):
    text = write(tmp_path / "a.jsonl", sentences(1500))
    want = made_in_one(tmp_path, text, tokenizer, monkeypatch)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, *map(str, (text, tmp_path / "two", tokenizer_file))],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=120)[0].splitlines()[-1].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert files(tmp_path / "two") == want
    assert not (tmp_path / "two" / "tokenised").exists()
    (first, rows), (second, same) = told
    assert rows == same
    assert abs(int(first) - int(second)) <= 1 and int(second) > 10
