"""Buckets, with an emulator of Cloud Storage: what is written there appears completely, reads as on
a disk, and belongs to one process at a time."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from btx_jax import buckets, claims, output
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.checkpoints.safetensors_files import SafetensorsFile, ShardWriter
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.cli import program
from btx_jax.commands.verify import verify
from btx_jax.config.config import CheckpointConfig
from btx_jax.data.prepared import read_manifest
from btx_jax.data.sources import expand_files, parse_sources, source_rows
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from btx_jax.models.llama import init_params
from btx_jax.paths import to_path
from btx_jax.reporting import metrics
from btx_jax.reporting.metrics import MetricsWriter, read_metrics
from btx_jax.rundir import held
from tests.conftest import ROOT
from tests.models.test_llama import TINY


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("gs://", "BUCKET"), ("gs:///x", "BUCKET"), ("gs://b/../x", "without"), ("gs://b//x", "without"),
        ("gs://b/./x", "without"), ("http://b/x", "not a path, gs://"),
        ("file:///x", "not a path, gs:"), ("gcs://b/x", "not a path, gs:"),
        ("gs:/b/x", "begins with gs://"), ("s3:b", "begins with s3://"),
    ],
)  # fmt: skip
def test_what_is_no_plain_url_is_refused(url, told):
    with pytest.raises(UserError, match=f"--workdir='{url}': .*{told}"):
        to_path(url, "--workdir")


def test_a_url_may_end_in_a_slash_and_hold_variables(monkeypatch):
    monkeypatch.setenv("RUN", "a")
    assert str(to_path("gs://bucket/$RUN/b/", "k")) == "gs://bucket/a/b"
    assert to_path("gs://bucket/$RUN/b/", "k") == to_path("gs://bucket/a/b", "k")


@pytest.mark.parametrize("name", ["a#1", "a?", "a*", "a[1]", "100%", "a%20b"])
def test_what_libraries_would_read_as_another_name_is_refused(name):
    with pytest.raises(UserError, match="has a special meaning in bucket libraries"):
        to_path(f"gs://b/{name}/run", "k")


@pytest.mark.parametrize("name", ["a b", "ünï", "a+b", "a@b", "a:b", "a,b", "a'b"])
def test_other_names_are_themselves_for_all_libraries(bucket, name):
    run = to_path(f"{bucket}/{name}", "k")
    params = init_params(TINY, jax.random.key(0))
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(CheckpointMetadata(TINY, 1, {}), params)
    checkpoints.close()
    assert digest(load_params(find_checkpoint(run))) == digest(params)


def test_a_missing_library_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install 'btx_jax\[s3\]'"):
        to_path("s3://bucket/x", "k")


def test_a_file_is_written_whole(bucket):
    output.write_json(bucket / "a.json", [1])
    assert output.read_json(bucket / "a.json") == [1]
    with pytest.raises(ZeroDivisionError), output.new_file(bucket / "b") as partial:  # noqa: PT012
        partial.write_text("half")
        _ = 1 / 0
    assert [path.name for path in bucket.iterdir()] == ["a.json"]


def test_a_directory_appears_whole_or_is_marked(bucket, bucket_server):
    def write(count):
        with output.new_directory(bucket / "out") as partial:
            (partial / "sub").mkdir()
            for i in range(count):
                (partial / "sub" / f"{i}").write_bytes(bytes(1000 - i))
            (partial / "config.json").write_text("{}")

    bucket_server.fault = lambda line: 403 if "config.json" in line and "POST" in line else 0
    with pytest.raises(UserError, match="bucket refused"):
        write(6)
    left = buckets.objects(bucket / "out")
    assert buckets.UNFINISHED in left
    assert "config.json" not in left
    assert not buckets.is_taken(bucket / "out")
    bucket_server.fault = lambda line: 0
    write(3)
    assert sorted(buckets.objects(bucket / "out")) == [
        "config.json",
        *(f"sub/{i}" for i in range(3)),
    ]
    with pytest.raises(UserError, match="exists; delete it or choose another name"):
        write(3)


@pytest.mark.parametrize(
    "read",
    [
        find_checkpoint,
        lambda path: find_checkpoint(path / "checkpoints" / "0"),
        lambda path: list(verify(str(path))),
        load_tokenizer,
        lambda path: held(path).__enter__(),
    ],
    ids=["checkpoint", "step", "verify", "tokenizer", "workdir"],
)
def test_what_is_half_there_is_read_by_none(bucket, read):
    for name in (buckets.UNFINISHED, "checkpoints/0/params/x", "config.json", "tokenizer.json"):
        (bucket / name).write_text("{}")
    with pytest.raises(
        UserError, match="is incomplete: another command is still writing it, or was killed"
    ):
        read(bucket)


def test_what_another_process_is_uploading_is_neither_taken_nor_removed_but_waited_for(bucket):
    target, refused = bucket / "out", []

    def write():
        with output.new_directory(target) as partial:
            (partial / "ours").write_text("{}")

    def second():
        with pytest.raises(UserError, match="exists; delete it") as raised:
            write()
        refused.append(raised)

    thread = threading.Thread(target=second)
    with claims.claimed(target):
        for name in (buckets.UNFINISHED, "theirs"):
            (target / name).write_bytes(b"")
        assert read_manifest(target) is None
        thread.start()
        thread.join(2 * output.WAIT)
        assert thread.is_alive()
        assert {buckets.UNFINISHED, "theirs"} < set(buckets.objects(target))
        buckets.remove(target / buckets.UNFINISHED)
    thread.join(20)
    assert refused
    assert list(buckets.objects(target)) == ["theirs"]


FILL = """
import os, signal, sys
from btx_jax import buckets, output
with output.new_directory(buckets.at(sys.argv[1], "k")) as partial:
    (partial / "large").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_on_this_disk_goes_with_the_next_that_writes(
    bucket, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", FILL, str(bucket / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*/large"))
    with output.temporary_directory() as held:
        output.write_json(bucket / "a.json", [1])
        assert list(tmp_path.iterdir()) == [held]
    assert list(tmp_path.iterdir()) == []


def test_what_describes_a_directory_is_sent_last(bucket, bucket_server, tmp_path):
    for size in (100_000, 10, 1000):
        (tmp_path / f"of_{size}").write_bytes(bytes(size))
    buckets.upload(tmp_path, bucket / "d")
    sent = [line for line in bucket_server.requests if "POST" in line and "of_" in line]
    assert sent[-1].endswith("/d/of_10")


def test_a_local_copy_is_fetched_once_and_anew_when_the_bucket_changes(bucket, bucket_server):
    for name in ("a", "sub/b", "c.bin"):
        (bucket / name).write_text(name)
    copy = buckets.local_copy(bucket, lambda name: name != "c.bin")
    assert sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()) == [
        "a",
        "sub/b",
    ]
    before = len(bucket_server.fetched())
    assert buckets.local_copy(bucket, lambda name: name != "c.bin") == copy
    assert len(bucket_server.fetched()) == before
    (bucket / "a").write_text("z")
    assert (buckets.local_copy(bucket) / "a").read_text() == "z"


def test_who_fetches_the_same_at_the_same_time_does_not_write_over_the_other(bucket, monkeypatch):
    """Threads here; in containers, even processes have the same id."""
    (bucket / "d" / "x").write_bytes(b"1")
    both, fetch, targets = threading.Barrier(2, timeout=20), buckets._fetch, set()

    def fetch_beside(directory, sizes, target):
        targets.add(target)
        both.wait()
        fetch(directory, sizes, target)
        both.wait()

    monkeypatch.setattr(buckets, "_fetch", fetch_beside)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(buckets.local_copy, [bucket / "d"] * 2)
    assert len(targets) == 2
    assert first == second
    assert (first / "x").read_bytes() == b"1"
    assert list(first.parent.iterdir()) == [first]


def test_a_cut_download_leaves_no_copy(bucket, bucket_server):
    for name in "abc":
        (bucket / name).write_text(name)
    bucket_server.fault = lambda line: 403 if "%2Fb?alt=media" in line else 0
    with pytest.raises(UserError), buckets.explained():
        buckets.local_copy(bucket)
    bucket_server.fault = lambda line: 0
    assert (buckets.local_copy(bucket) / "b").read_text() == "b"


def test_one_of_many_creates_an_object(bucket):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(buckets.create(bucket / "x", b"%d" % i)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


HOLD = """
import sys, time
from btx_jax import buckets, claims
with claims.claimed(buckets.at(sys.argv[1], "k")):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(bucket):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bucket)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_directory_has_one_process_and_a_killed_one_leaves_it_at_once(bucket):
    process = holder(bucket)
    try:
        with pytest.raises(UserError, match="another process is using it"), held(bucket):
            pass
    finally:
        process.kill()
        process.wait()
    start = time.monotonic()
    with held(bucket):
        assert len(buckets.objects(bucket / claims.FOLDER)) == 1
    assert time.monotonic() - start < claims.RENEWED
    assert buckets.objects(bucket) == {}


def stranger(bucket, monkeypatch):
    """A claim by another machine."""
    here = claims._this_process()
    claim = claims._Claim(3, {**here, "host": "elsewhere"}, "n", 7)
    assert buckets.create(claims._file(bucket, 3), claims._told(claim))
    monkeypatch.setattr(claims, "RENEWED", 0.4)
    monkeypatch.setattr(claims, "LAPSED", 2.0)
    return claim


def test_a_silent_machine_loses_its_directory(bucket, monkeypatch):
    stranger(bucket, monkeypatch)
    start = time.monotonic()
    with claims.claimed(bucket):
        assert 2 <= time.monotonic() - start < 10
        assert list(buckets.objects(bucket / claims.FOLDER)) == ["00000004.json"]


def test_a_machine_that_gives_signs_of_life_keeps_it(bucket, monkeypatch):
    claim = stranger(bucket, monkeypatch)
    renewal = threading.Timer(
        0.5, lambda: claims._file(bucket, 3).write_bytes(claims._told(claim.renewed()))
    )
    renewal.start()
    with pytest.raises(BlockingIOError), claims.claimed(bucket):
        pass
    renewal.join()


def test_a_process_that_was_cut_off_and_lost_its_directory_ends(bucket):
    process = subprocess.Popen(
        [sys.executable, "-c", "from btx_jax import claims\nclaims.RENEWED = 0.3\n" + HOLD, str(bucket)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    other = claims._Claim(2, {"host": "elsewhere"}, "other", 0)
    assert buckets.create(claims._file(bucket, 2), claims._told(other))
    assert process.wait(20) == 1
    assert "another process has taken this directory" in process.stderr.read()


def test_text_is_found_by_globs_and_of_parquet_only_a_column_is_fetched(
    bucket, bucket_server, tmp_path
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (bucket / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (bucket / "deep" / "b.txt").write_text("three")
    rng = np.random.default_rng(0)
    noise = [rng.bytes(1000).hex() for _ in range(2000)]
    file = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["four"] * 2000, "noise": noise}), file)
    (bucket / "c.parquet").write_bytes(file.read_bytes())

    def texts(pattern):
        (source,) = parse_sources(f"{bucket}/{pattern}", "k")
        return [row.value for row in source_rows(source, expand_files(source, "k"))]

    assert [row["text"] for row in texts("*.jsonl")] == ["one", "two"]
    assert texts("deep/*.txt") == ["three"]
    lines = b'{"text": "packed"}\n' * 5
    (bucket / "z.jsonl.gz").write_bytes(gzip.compress(lines))
    (bucket / "z.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    for packed in ("z.jsonl.gz", "z.jsonl.zst"):
        assert [row["text"] for row in texts(packed)] == ["packed"] * 5
    bucket_server.received = 0
    assert len(texts("*.parquet")) == 2000
    assert 0 < bucket_server.received < file.stat().st_size / 10
    for wrong, told in (("none*", "no file matches"), ("deep", "is a directory")):
        with pytest.raises(UserError, match=told):
            texts(wrong)


def test_tensors_are_read_by_ranges(bucket, bucket_server, tmp_path):
    tensor = np.arange(512 * 256, dtype=np.float32).reshape(512, 256)
    writer = ShardWriter(tmp_path, {"w": (tensor.shape, tensor.dtype), "v": ((4,), tensor.dtype)})
    writer.write("w", tensor)
    writer.write("v", tensor[0, :4])
    writer.finish()
    buckets.upload(tmp_path, bucket)
    file = SafetensorsFile(bucket / next(p.name for p in bucket.glob("*.safetensors")))
    np.testing.assert_array_equal(file.read("w"), tensor)
    np.testing.assert_array_equal(file.read("w", rows=(8, 24)), tensor[8:24])
    np.testing.assert_array_equal(file.read("w", rows=(8, 24), columns=(3, 9)), tensor[8:24, 3:9])
    (bucket / file.path.name).write_bytes(b"\xff" * 7)
    with pytest.raises(UserError, match="truncated"):
        SafetensorsFile(file.path)


def test_metrics_are_uploaded_in_parts_and_a_resumed_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(metrics, "PART_BYTES", 200)
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 21):
        writer.write(step, {"loss": step / 2})
        if step == 10:
            writer.sync()
            assert [line["step"] for line in read_metrics(bucket)] == list(range(1, 11))
    writer.close()
    assert len(metrics.parts(bucket)) > 2
    assert [line["step"] for line in read_metrics(bucket)] == list(range(1, 21))
    again = MetricsWriter(bucket, 12)
    again.write(13, {"loss": 0.0})
    again.close()
    assert [line["step"] for line in read_metrics(bucket)] == list(range(1, 14))
    files = [path for path in buckets.objects(bucket / "tensorboard") if "tfevents" in path]
    assert len(files) >= 2


def test_metrics_wait_for_a_bucket_that_refuses_them(bucket, bucket_server, caplog):
    writer = MetricsWriter(bucket, 0)
    writer.write(1, {"loss": 1.0})
    bucket_server.fault = lambda line: 403
    writer.sync()
    assert "metrics are waiting to be uploaded" in caplog.text
    bucket_server.fault = lambda line: 0
    writer.close()
    assert read_metrics(bucket) == [{"step": 1, "loss": 1.0}]


def test_a_few_refusals_in_the_middle_are_asked_again(bucket, bucket_server):
    left = {503: 2, 429: 1}

    def fault(line):
        for status, count in left.items():
            if count and "alt=media" in line:
                left[status] -= 1
                return status
        return 0

    (bucket / "a").write_text("x")
    bucket_server.fault = fault
    assert (bucket / "a").read_text() == "x"
    assert left == {503: 0, 429: 0}


@pytest.mark.parametrize(
    ("status", "told"),
    [(403, "bucket refused: Forbidden"), (401, "bucket refused|cannot be reached")],
)
def test_a_bucket_that_may_not_be_read_is_one_line(bucket, bucket_server, status, told):
    bucket_server.fault = lambda line: status
    with pytest.raises(UserError, match=f"--workdir: .*{told}") as raised, held(bucket):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "command",
    [
        ("digest", "{x}"),
        ("verify", "{x}"),
        ("mix", "{x}", "out"),
        ("report", "{x}"),
        ("push", "{x}", "a/b"),
        ("adapter", "export", "{x}", "{x}2"),
        ("generate", "{x}", "--prompt=a"),
        ("tokenizer", "{x}", "--vocab-size=300", "--out=a.model"),
    ],
    ids=lambda command: command[0],
)
def test_a_bucket_that_refuses_is_one_line_of_every_command(
    bucket, bucket_server, capsys, command, monkeypatch
):
    monkeypatch.setattr(buckets, "_required", set())
    bucket_server.fault = lambda line: 401
    with pytest.raises(SystemExit) as ended:
        program.run([word.format(x=bucket / "x") for word in command])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the bucket" in line and "401" in line


def test_a_bucket_that_takes_nothing_is_told_before_a_run_begins(bucket, bucket_server):
    bucket_server.fault = lambda line: 403 if line.startswith("POST") else 0
    refused = "--workdir: cannot write to gs://.*: the bucket refused"
    with pytest.raises(UserError, match=refused), held(bucket / "run"):
        pytest.fail("began")


def test_whether_a_bucket_is_there_is_asked_without_listing_it(bucket, bucket_server, monkeypatch):
    monkeypatch.setattr(buckets, "_required", set())
    buckets.require(bucket, "k")
    (asked,) = bucket_server.requests
    assert "maxResults=1" in asked.split("&")


def test_a_missing_bucket_is_one_line(bucket):
    nowhere = buckets.at("gs://nowhere/run", "k")
    told = "bucket gs://nowhere does not exist or is not accessible"
    with pytest.raises(UserError, match=f"--workdir: {told}"), held(nowhere):
        pass
    with pytest.raises(UserError, match=f"cannot write gs://nowhere/run: {told}"):
        output.check_free(nowhere)


def test_a_claim_tells_whose_it_is(bucket):
    with claims.claimed(bucket):
        (name,) = buckets.objects(bucket / claims.FOLDER)
        told = json.loads((bucket / claims.FOLDER / name).read_text())
        assert told["process"]["pid"] == os.getpid()
