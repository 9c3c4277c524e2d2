"""Branches as concurrent processes on one machine, through the real command line: one is killed and
restarted."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.cli

PIPELINE = """
import dataclasses
from btx_jax.presets import recipes
from btx_jax.config.config import *
from btx_jax.config.config_dict import to_config_dict
def get_config():
    data = dataclasses.replace(recipes._data('tiny', {text!r}), tokenizer={tokenizer!r}, sequence_length=64, cache={cache!r},
        domains={{}}, heldout='')
    model = ModelConfig(320, 2, 32, 64, 2, 2, 16, context=64)
    train = lambda steps: TrainConfig(steps, 8, warmup_steps=1)
    seed = dataclasses.replace(recipes._seed('tiny'), model=model, train=train(3), data=data)
    branch = dataclasses.replace(seed, init='@seed', model=None, train=train(250), checkpoint=CheckpointConfig(10))
    finetune = dataclasses.replace(branch, init='@mix', train=train(4), compute=dataclasses.replace(branch.compute, group_size=64))
    stages = {{'seed': PipelineStage(seed)}}
    for name in 'abc':
        stages[name] = PipelineStage(branch, ('seed',))
    stages['mix'] = PipelineStage(recipes._mix(('@a', '@b', '@c', '@seed')), ('a', 'b', 'c', 'seed'))
    stages['finetune'] = PipelineStage(finetune, ('mix',))
    return to_config_dict(Config('pipeline', pipeline=stages))
"""


def steps(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_branches_run_together_and_one_that_is_killed_touches_no_other(cli):
    config = cli.home / "pipeline.py"
    config.write_text(
        PIPELINE.format(
            text=str(cli.text), tokenizer=str(cli.tokenizer), cache=str(cli.home / "cache")
        )
    )
    work = cli.home / "together"
    submit = [
        sys.executable,
        "-m",
        "btx_jax",
        "submit",
        f"--pipeline={config}",
        "--backend=local",
        f"--workdir={work}",
        "--parallel=3",
    ]
    process = subprocess.Popen(
        submit, cwd=ROOT, env=cli.environment, stderr=subprocess.PIPE, text=True
    )
    for _ in range(6000):
        if all(steps(work / name) > 12 for name in "abc"):
            break
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    assert not any((work / name / "done.json").exists() for name in "abc"), (
        "three branches were to be under way at once"
    )
    children = subprocess.run(
        ["pgrep", "-f", f"workdir={work} --only=b$"], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 1
    subprocess.run(["kill", f"-{signal.SIGKILL}", *children], check=True)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert "b: exit status -9" in error.splitlines()[-1]
    assert [name for name in ("a", "b", "c", "mix") if (work / name / "done.json").exists()] == [
        "a",
        "c",
    ]

    before = {name: (work / name / "done.json").stat().st_mtime_ns for name in ("seed", "a", "c")}
    subprocess.run(submit, cwd=ROOT, env=cli.environment, check=True, capture_output=True)
    assert {name: (work / name / "done.json").stat().st_mtime_ns for name in before} == before, (
        "a finished job ran again"
    )
    assert json.loads((work / "done.json").read_text())["seconds"] > 0
    metrics = [
        json.loads(line)["step"] for line in (work / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert metrics == list(range(1, 251)), "the killed branch resumed"

    cli.run(f"--config={config}", f"--workdir={cli.home / 'alone'}")
    for name in ("a", "b", "c", "mix", "finetune"):
        assert cli.digest(f"together/{name}") == cli.digest(f"alone/{name}"), name


def test_one_stage_alone_needs_what_it_needs(cli):
    config = cli.home / "pipeline.py"
    config.write_text(
        PIPELINE.format(
            text=str(cli.text), tokenizer=str(cli.tokenizer), cache=str(cli.home / "cache")
        )
    )
    where = (f"--config={config}", f"--workdir={cli.home / 'P'}")
    assert "--only=mix: needs a, b, c, seed, which has not finished" in cli.fails(
        *where, "--only=mix"
    )
    assert "--only=d: no such stage; known: seed, a, b, c, mix, finetune" in cli.fails(
        *where, "--only=d"
    )
