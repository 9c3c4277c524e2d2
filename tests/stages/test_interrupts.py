"""Signals, full disks and repeated work: one line, nothing lost, nothing left over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.config.config import CheckpointConfig, Config, MeshConfig, MixConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.models.llama import init_params
from btx_jax.output import new_directory, new_file
from tests.conftest import ROOT
from tests.models.test_llama import TINY
from tests.stages.storm import Storm

WRITES = """
import sys, threading, pathlib, time, gc
from btx_jax import interrupts
from btx_jax.output import new_directory, new_file
interrupts.end_at_once("run the same command again")
def write(folder):
    for i in range(10**9): (folder / str(i)).write_text("x")
with new_directory(pathlib.Path("out")) as partial, new_file(pathlib.Path("file")) as file:
    threading.Thread(target=write, args=(partial,), daemon=True).start()
    gc.callbacks.append(lambda phase, info: time.sleep(0.01))
    print("ready", flush=True)
    while True: gc.collect()
"""
NOTES = """
import signal, time
from btx_jax import interrupts
interrupts.end_at_once("again")
with interrupts.noted("saving") as came:
    print("ready", flush=True)
    while not came(): time.sleep(0.01)
    print(came(), flush=True)
    time.sleep(60)
"""


def python(code, cwd, ignored=False):
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_leaves_nothing_though_threads_write_on(tmp_path, number):
    """Python drops a KeyboardInterrupt raised in the garbage collector's callback, which this
    process is nearly always running."""
    process = python(WRITES, tmp_path)
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "\nbtx_jax: interrupted; run the same command again\n"
    assert not list(tmp_path.iterdir())


def test_the_first_signal_is_noted_the_second_ends_and_nohup_is_respected(tmp_path):
    process = python(NOTES, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "2\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\nbtx_jax: saving\n\nbtx_jax: interrupted; again\n"
    deaf = python(NOTES, tmp_path, ignored=True)
    deaf.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert deaf.poll() is None
    deaf.send_signal(signal.SIGTERM)
    assert deaf.stdout.readline() == "15\n"
    deaf.kill()
    deaf.communicate()


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    for name in (".a.partial-12345678", ".b.partial-12345678"):
        (tmp_path / name).write_text("left")
    with new_file(tmp_path / "a") as mine:
        assert not (tmp_path / ".a.partial-12345678").exists()
        with new_file(tmp_path / "a") as another:
            another.write_text("2")
        assert mine.exists(), "taken from a living one"
        mine.write_text("1")
    assert (tmp_path / "a").read_text() == "1"
    assert (tmp_path / ".b.partial-12345678").exists(), "another file's"
    with new_directory(tmp_path / "b") as partial:
        (partial / "x").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def save(workdir: Path, seed: int, tokenizer: Path, steps=(1,), keep=2) -> None:
    shutil.rmtree(workdir, ignore_errors=True)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=keep))
    for step in steps:
        checkpoints.save(
            CheckpointMetadata(TINY, step, {}), init_params(TINY, jax.random.key(seed))
        )
    checkpoints.close()
    copy_tokenizer(load_tokenizer(tokenizer), workdir / "tokenizer")


def test_unfinished_saves_and_half_deleted_steps_are_swept_at_the_next_start(
    tmp_path, tokenizer_file
):
    save(tmp_path, 0, tokenizer_file, steps=(1, 2, 3), keep=3)
    at = tmp_path / "checkpoints"
    shutil.rmtree(at / "1" / "params")  # an interrupted deletion
    (at / "4.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    assert sorted(path.name for path in at.iterdir()) == ["2", "3"]


def test_a_mix_that_was_interrupted_takes_the_sources_as_they_are_now(tmp_path, tokenizer_file):
    sources = [tmp_path / name for name in "ab"]
    for seed, source in enumerate(sources):
        save(source, seed, tokenizer_file)
    config = Config("mix", mix=MixConfig(tuple(map(str, sources))), mesh=MeshConfig())
    stages.run(config, tmp_path / "mix")
    first = digest(load_params(find_checkpoint(tmp_path / "mix")))
    (tmp_path / "mix" / "done.json").unlink()
    save(sources[1], 7, tokenizer_file)
    stages.run(config, tmp_path / "mix")
    stages.run(config, tmp_path / "fresh")
    again, fresh = (digest(load_params(find_checkpoint(tmp_path / n))) for n in ("mix", "fresh"))
    assert again == fresh != first


@pytest.mark.slow
@pytest.mark.cli
def test_held_out_losses_lost_to_a_kill_behind_the_save_are_made_up(cli):
    seed = cli.seed("run", "--config.train.eval_every=4", "--config.train.eval_rows=8", steps=8)
    cli.run(*seed)
    file = cli.home / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 8
    assert "heldout" in last
    file.write_text("".join(line + "\n" for line in lines[:-1]))
    (cli.home / "run" / "done.json").unlink()
    cli.run(*seed)
    assert file.read_text().splitlines() == lines
    cli.run(*seed)
    assert file.read_text().splitlines() == lines, "made up once"


@pytest.mark.slow
@pytest.mark.cli
def test_a_full_disk_in_training_is_one_line_that_says_what_is_good(cli):
    """No file may exceed 40 KB, which simulates a full disk."""
    cli.run(*cli.seed("other", steps=2))  # makes the cache of the text
    seed = cli.seed("run", steps=12, every=4)
    limited = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 40; exec "$@"',
            "-",
            sys.executable,
            "-m",
            "btx_jax.launch",
            *seed,
        ],
        env={**cli.environment, "JAX_COMPILATION_CACHE_DIR": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert limited.returncode == 2
    told = [line for line in limited.stderr.splitlines() if "File too large" in line]
    assert len(told) == 1, limited.stderr[-3000:]
    assert told[0].endswith("File too large; no step has been saved there yet")
    assert "Traceback" not in limited.stderr
    assert not list((cli.home / "run").glob("checkpoints/*"))


@pytest.mark.cli
def test_ctrl_c_in_training_saves_the_step_and_ends(cli):
    process = cli.start(*cli.seed("run", steps=4000, every=3900))
    cli.wait_for_step("run", 5, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error[-2000:]
    assert "Traceback" not in error
    assert "saving the last complete step; press Ctrl-C again to quit immediately" in error
    last = cli.steps_logged("run")[-1]
    assert f"SIGINT: saved step {last}; run the same command to resume" in error
    assert (cli.home / "run" / "checkpoints" / str(last) / "params").is_dir()


@pytest.mark.slow
def test_ten_signals_at_random_moments_change_nothing_and_leave_nothing(tmp_path):
    table = Storm(tmp_path, seed=time.time_ns()).run(signals=10)
    assert sum(table.values()) >= 10
