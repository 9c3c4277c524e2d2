"""The real command line in subprocesses: kill, resume, stop, custom text, invalid input."""

import gzip
import json
import random
import re
import signal
import time

import pyarrow
import pyarrow.parquet
import pytest

from btx_jax.checkpoints.training_state import read_metadata
from btx_jax.cli.program import run as btx
from btx_jax.data.tokenizers import load_tokenizer
from tests.conftest import ROOT, sentences

pytestmark = pytest.mark.cli


@pytest.mark.slow
def test_three_sigkills_change_nothing(cli):
    cli.run(*cli.seed("whole"))
    want = cli.digest("whole")
    assert len(want) == 64
    moments = random.Random(time.time_ns())
    kills = 0
    for lowest in (3, 18, 36):  # each kill comes at a random moment of the run's next third
        process = cli.start(*cli.seed("killed"))
        cli.wait_for_step("killed", lowest + moments.randrange(14), process)
        time.sleep(moments.random() * 0.1)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills == 3, "the run ended before it could be killed three times"
    cli.run(*cli.seed("killed"))
    assert cli.digest("killed") == want
    assert cli.steps_logged("killed") == list(range(1, 61)), "metrics have a gap or a step twice"
    losses = [
        [json.loads(x)["loss"] for x in (cli.home / w / "metrics.jsonl").read_text().splitlines()]
        for w in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert (cli.home / "killed" / "done.json").exists()
    _, told = cli.run("run", "seed:tiny", *cli.seed("killed")[1:], module="btx_jax")
    assert "already finished" in told, "the same program under its two names"


@pytest.mark.slow
def test_sigterm_saves_the_step_it_was_in_and_another_config_is_refused(cli):
    process = cli.start(*cli.seed("run", steps=2000, every=1900))
    cli.wait_for_step("run", 5, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error[-2000:]
    saved = [int(p.name) for p in (cli.home / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [cli.steps_logged("run")[-1]], "the checkpoint is not that of the last step"
    assert f"saved step {saved[0]}" in error
    line = cli.fails(*cli.seed("run", "--config.train.learning_rate=0.5", steps=2000, every=1900))
    assert "a different config: train.learning_rate: 0.003 -> 0.5" in line
    assert "choose another --workdir" in line
    with cli.text.open("a") as file:
        file.write("One more line.\n")
    assert f"checkpoints/{saved[0]}: text changed since step {saved[0]} was saved" in cli.fails(
        *cli.seed("run", steps=2000, every=1900)
    )


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_is_the_same_run(cli):
    process = cli.start(*cli.seed("moved", steps=200, every=5))
    cli.wait_for_step("moved", 12, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    first = read_metadata(next((cli.home / "moved" / "checkpoints").glob("[0-9]*")))
    (moved,) = cli.start_several(
        1, 2, *cli.seed("moved", "--config.mesh.data=2", steps=200, every=300)
    )
    assert moved.wait(timeout=300) == 0
    ((run, costs),) = read_metadata(cli.home / "moved" / "checkpoints" / "200").history.items()
    assert run in first.history
    assert costs.tokens == 200 * 8 * 64
    assert costs.seconds > first.history[run].seconds > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(cli):
    line = cli.fails(*cli.seed("nan", "--config.train.learning_rate=1e30", every=1))
    step = int(re.search(r"step (\d+): loss", line)[1])
    assert (
        f"not finite; the checkpoint of step {step - 1} is intact; lower config.train.learning_rate"
        in line
    )
    assert cli.steps_logged("nan") == list(range(1, step + 1)), (
        "the step that failed is in the metrics"
    )
    saved = [int(p.name) for p in (cli.home / "nan" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == step - 1
    assert not (cli.home / "nan" / "done.json").exists()


@pytest.mark.slow
def test_own_text_from_a_checkpoint(cli):
    cli.run(*cli.seed("seed", steps=4, every=4))
    folder = cli.home / "own"
    folder.mkdir()
    texts = sentences(90, seed=5)
    (folder / "a.txt").write_text("".join(texts[:30]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts[30:60]))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts[60:], "n": list(range(30))}), folder / "c.parquet"
    )
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "fields.jsonl").write_text(
        '{"text": "good text here"}\n{"body": "no text"}\nnot json\n'
    )
    names = ("a.txt", "b.jsonl.gz", "c.parquet", "empty.txt", "latin.txt", "fields.jsonl")

    def expert(workdir, files, *more):
        return (
            "--config=configs/math_expert.py:tiny", f"--config.data.train={files}", f"--config.init={cli.home / 'seed'}",
            f"--workdir={cli.home / workdir}", f"--config.data.cache={cli.home / 'cache'}", "--config.train.steps=3",
            "--config.train.warmup_steps=1", "--config.data.sequence_length=64", *more,
        )  # fmt: skip

    good = ",".join(str(folder / name) for name in names[:3])
    _, told = cli.run(*expert("W", good))
    assert "document longer than 64 tokens: split into several rows, nothing is lost" in told
    assert "parameters, on 1 x cpu\n" in told
    assert cli.digest("W") != cli.digest("seed")
    assert "bits_per_byte" in (cli.home / "W" / "metrics.jsonl").read_text(), (
        "held-out loss on own text"
    )
    text, _ = cli.run(
        "generate", cli.home / "W", "--prompt", "the river", "--max-tokens", "5", module="btx_jax"
    )
    assert text.startswith("the river")

    assert "yields no document to train on: 1 x file without documents" in cli.fails(
        *expert("E1", folder / "empty.txt")
    )
    assert "invalid UTF-8 (first: " in cli.fails(*expert("E2", folder / "latin.txt"))
    line = cli.fails(*expert("E3", f"{folder / 'fields.jsonl'}#story"))
    assert "no field 'story'" in line
    assert "which has: text; name the field as FILE#FIELD" in line
    _, told = cli.run(*expert("E4", folder / "fields.jsonl"))
    for problem in (
        "1 x document skipped: no field 'text'",
        "1 x line skipped: not JSON",
    ):
        assert problem in told
    assert "c.parquet has no field 'story'; it has: text, n" in cli.fails(
        *expert("E5", f"{folder / 'c.parquet'}#story")
    )
    assert "no file matches" in cli.fails(*expert("E6", folder / "nothing-*.txt"))


def test_wrong_commands_are_one_line(cli):
    line = cli.fails("--config=configs/seed.py:tiny", "--config.train.stepz=5")
    assert 'config.train.stepz: unknown key; Did you mean "steps"' in line
    assert "--config is missing" in cli.fails()
    assert "Unable to open flagfile" in cli.fails("--flagfile=/missing")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["run", "configs/seed.py:huge"], "no such size; known: llama2_7b"),
        (["run", "configs/nothing.py"], "configs/nothing.py"),
        (["run", "math_expert:tiny"], "config.init: missing; name the checkpoint to start from"),
        (
            ["run", "math_expert:tiny", "--config.init=/nowhere"],
            "config.init: /nowhere does not exist",
        ),
        (["digest", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_the_program_s_errors_are_one_line(capsys, monkeypatch, command, told):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        btx(command)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("btx_jax: error: ")
    assert told in line
    assert line.count("\n") == 1


@pytest.mark.slow
def test_a_failing_branch_leaves_the_others_results(cli):
    (cli.home / "empty.txt").write_text("")
    small = cli.home / "pipeline.py"
    small.write_text(
        "import dataclasses\nfrom btx_jax.presets import recipes\nfrom btx_jax.config.config import *\nfrom"
        " btx_jax.config.config_dict import to_config_dict\ndef get_config():\n    data ="
        f" dataclasses.replace(recipes._data('tiny', {str(cli.text)!r}),"
        f" tokenizer={str(cli.tokenizer)!r}, sequence_length=64,\n       "
        f" cache={str(cli.home / 'cache')!r}, domains={{}}, heldout='')\n    model ="
        " ModelConfig(320, 2, 32, 64, 2, 2, 16, context=64)\n    train = TrainConfig(3, 8,"
        " warmup_steps=1)\n    seed = dataclasses.replace(recipes._seed('tiny'), model=model,"
        " train=train, data=data)\n    branch = dataclasses.replace(seed, init='@seed',"
        " model=None)\n    bad = dataclasses.replace(branch, data=dataclasses.replace(data,"
        f" train={str(cli.home / 'empty.txt')!r}))\n"
        "    stages = {'seed': PipelineStage(seed), 'bad':"
        " PipelineStage(bad, ('seed',)), 'good': PipelineStage(branch, ('seed',)),\n             "
        " 'mix': PipelineStage(recipes._mix(('@bad', '@good', '@seed')), ('seed', 'bad',"
        " 'good'))}\n    return to_config_dict(Config('pipeline', pipeline=stages))\n"
    )
    arguments = (f"--config={small}", f"--workdir={cli.home / 'P'}")
    line = cli.fails(*arguments)
    assert (
        f"2 of 4 stages did not finish (bad: config.data: {cli.home / 'empty.txt'} yields no"
        in line
    )
    assert "; not started because of these: mix)" in line
    assert (cli.home / "P" / "good" / "done.json").exists()
    before = (cli.home / "P" / "seed" / "done.json").stat().st_mtime_ns
    cli.fails(*arguments)
    assert (cli.home / "P" / "seed" / "done.json").stat().st_mtime_ns == before, (
        "a finished stage ran again"
    )


@pytest.mark.slow
def test_a_tokenizer_trained_from_the_command_line_gives_back_any_text_and_replaces_nothing(cli):
    target = cli.home / "own.model"
    cli.run("tokenizer", cli.text, "--vocab-size=300", f"--out={target}", module="btx_jax")
    tokenizer = load_tokenizer(target)
    text = "  def f(x):\n\treturn x ** 2  # naïve 東京 1234\n\n"
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(text)) == text
    trained = target.read_bytes()
    _, error = cli.run(
        "tokenizer", cli.text, "--vocab-size=310", f"--out={target}", module="btx_jax", status=2
    )
    assert "exists; delete it or choose another name" in error and target.read_bytes() == trained
    _, error = cli.run(
        "tokenizer",
        cli.text,
        "--vocab-size=100000",
        f"--out={cli.home / 'b.model'}",
        module="btx_jax",
        status=2,
    )
    assert error.startswith(
        "btx_jax: error: cannot train a tokenizer of 100000 pieces"
    ) and not list(cli.home.glob("*b.model*"))


@pytest.mark.slow
def test_a_hugging_face_directory_stands_wherever_a_checkpoint_does(cli):
    """seed -> Hugging Face -> branch from that -> mix both kinds -> generate from the mixture."""
    cli.run(*cli.seed("S", steps=2))
    cli.run("convert", cli.home / "S", cli.home / "hf", module="btx_jax")
    assert cli.run("digest", cli.home / "hf", module="btx_jax") == cli.run(
        "digest", cli.home / "S", module="btx_jax"
    )
    cli.run(
        "--config=configs/math_expert.py:tiny", f"--config.init={cli.home / 'hf'}", f"--workdir={cli.home / 'E'}",
        f"--config.data.train={cli.text}", f"--config.data.cache={cli.home / 'cache'}", "--config.data.sequence_length=64",
        "--config.train.steps=2", "--config.train.warmup_steps=1", "--config.train.eval_every=0",
    )  # fmt: skip
    recipe = cli.home / "r.yml"
    experts = [{"source_model": str(cli.home / name)} for name in ("E", "hf")]
    recipe.write_text(
        json.dumps({"base_model": str(cli.home / "hf"), "base": "average", "experts": experts})
    )
    out, _ = cli.run("mix", recipe, cli.home / "M", "--verify", module="btx_jax")
    assert "means within one ulp of float32" in " ".join(out.split())
    out, _ = cli.run(
        "generate", cli.home / "M", "--prompt", "the river", "--max-tokens", "3", module="btx_jax"
    )
    assert out.startswith("the river")
