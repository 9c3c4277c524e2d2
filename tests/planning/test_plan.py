"""A plan beside what then happened."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.cli.program import run as btx
from btx_jax.config.config import Config
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from btx_jax.planning.plan import Plan, Read, Stage, plan
from btx_jax.planning.steps import Step, on_this_machine
from btx_jax.planning.tables import as_json, tables, warnings
from btx_jax.presets.project import METHODS, project
from btx_jax.presets.registry import PRESETS
from btx_jax.stages import pipeline
from btx_jax.terminal import size
from btx_jax.training.storage import shortage
from tests.conftest import sentences
from tests.stages.test_evaluate import DENSE, checkpoint

FAST = Step(seconds=2.0, compile_seconds=10.0, heldout_seconds=0.5, memory=1e6)


def fixed(config, model):
    return FAST


@pytest.fixture
def home(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    for number, name in enumerate(("a", "b", "c")):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(80, seed=number))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def made(method="btx", **changes):
    domains = {name: {"text": f"{name}.jsonl", "tokens": 2_000} for name in ("a", "b")}
    fields = {"finetune_tokens": 1_500, "general": "c.jsonl", "sequence_length": 32}
    given = fields | {"dtype": "float32", "heldout_fraction": 0.2, "method": method} | changes
    return project(seed="seed", domains=domains, **given)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "ffn_only")) for name in METHODS],
)
def test_tokens_flops_and_storage_are_what_they_will_be(home, method):
    config = made(method, compare=["dense"])
    told = plan(config, home / "run", fixed, 1)
    stages.run(config, home / "run")
    trained = [stage for stage in told.stages if stage.steps]
    assert {stage.name for stage in trained} == {"expert_a", "expert_b", "finetune", "dense"}
    for stage in trained:
        history = find_checkpoint(home / "run" / stage.name).metadata.history
        own = [run for run in history.values() if run][-1]
        assert (stage.tokens, stage.flops) == (own.tokens, pytest.approx(own.flops)), stage.name
        folder = home / "run" / stage.name / "checkpoints"
        left = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        # Compressed, and the best step may be among the newest.
        assert 0.4 * stage.storage < left < 1.5 * stage.storage + 2**20, stage.name


def test_epochs_are_told_once_text_is_tokenised(home):
    config = made()
    before = plan(config, home / "run", fixed, 1)
    assert all(read.epochs is None for stage in before.stages for read in stage.reads)
    (told,) = (told for told in warnings(before) if "not tokenised yet" in told)
    assert told.count("a.jsonl") == told.count("b.jsonl") == 1
    assert config.pipeline
    stages.run(config.pipeline["prepare"].config, home / "prepared")
    done = json.loads((home / "prepared/done.json").read_text())
    there = done["domains"]["a"][0]["splits"]["train"]["tokens"]
    after = plan(config, home / "run", fixed, 1)
    assert all(read.epochs for stage in after.stages for read in stage.reads)
    stage = next(s for s in after.stages if s.name == "expert_a")
    read = {read.domain: read for read in stage.reads}
    assert read["a"].there == there and read["a"].read == pytest.approx(0.95 * stage.tokens)
    assert read["a"].epochs == pytest.approx(0.95 * stage.tokens / there)


def test_text_in_common_is_warned_of_before_it_is_tokenised(home):
    told = warnings(plan(made(general="*.jsonl"), home / "run", fixed, 1))
    pairs = [warning.split(" share")[0] for warning in told if "share text" in warning]
    assert pairs == ["a and general", "b and general"]
    assert not any("share text" in each for each in warnings(plan(made(), home / "run", fixed, 1)))


def test_every_program_is_asked_for_once(home):
    asked = []

    def steps(config, model):
        asked.append(model.moe)
        return FAST

    plan(made(), home / "run", steps, 1)
    assert len(asked) == 2  # branches are one program, the mixture another


def test_time_is_steps_and_compiling_and_measuring(home):
    config = made()
    stage = next(s for s in plan(config, home / "run", fixed, 1).stages if s.name == "finetune")
    assert config.pipeline
    train = config.pipeline["finetune"].config.train
    evaluations = 1 + -(-train.steps // train.eval_every)
    wanted = 2.0 * train.steps + 10.0 + evaluations * 3 * train.eval_rows * 0.5
    assert stage.seconds == pytest.approx(wanted)
    assert stage.stepping == 2.0 * train.steps


def test_every_program_is_compiled_once(home):
    step = dataclasses.replace(FAST, heldout_seconds=0.0)
    compare = ["dense", "upcycling"]
    told = plan(made(compare=compare), home / "run", lambda config, model: step, 1)
    compiling = {s.name: s.seconds - s.stepping for s in told.stages if s.steps}
    # Branches are one program; dense training and upcycling have one train section, but two models.
    once = ("expert_a", "finetune", *compare)
    assert compiling == {"expert_b": 0.0} | dict.fromkeys(once, 10.0)


def test_one_waits_for_the_longest_way():
    told = Plan(
        (
            Stage("seed", "train", (), seconds=5),
            Stage("a", "train", ("seed",), seconds=7),
            Stage("b", "train", ("seed",), seconds=3),
            Stage("mix", "mix", ("a", "b"), seconds=1),
            Stage("alone", "train", (), seconds=9),
        ),
        4,
    )
    assert [stage.name for stage in told.critical] == ["seed", "a", "mix"]
    found = as_json(told, price=3.6)
    assert found["critical_seconds"] == 13 and found["seconds"] == 25
    assert found["cost"] == pytest.approx(25 * 4 * 3.6 / 3600)


def test_many_epochs_and_what_does_not_fit_are_warned_of():
    read = Read("law", "law.txt", 1_000, 4_500.0)
    told = list(warnings(Plan((Stage("a", "train", (), fits=False, reads=(read,)),), 1)))
    assert told == [
        "a: does not fit; `btx compile` names the cheapest change that helps",
        "a: reads law.txt 4.5 times; beyond 4, further repetition helps less and less",
    ]


def test_dense_training_and_upcycling_of_the_same_tokens(home):
    told = plan(made(), home / "run", fixed, 1)
    ours, dense, upcycled = told.otherwise
    assert ours.tokens == dense.tokens == upcycled.tokens
    assert dense.flops < ours.flops < upcycled.flops
    assert ours.seconds < ours.chip_seconds
    mix = next(stage for stage in told.stages if stage.kind == "mix")
    assert ours.name == "this run: branches, mix, finetune" and mix.seconds
    of = {stage.name: stage.stepping for stage in told.stages}
    longest = max(of["expert_a"], of["expert_b"])
    assert ours.seconds == pytest.approx(longest + mix.seconds + of["finetune"])
    caption = str(tables(told, price=0.0)[-1].caption)
    assert (
        "whose training is not counted here" in caption
        and "This run differs from that study" in caption
    )
    for way in told.otherwise:
        assert way.expected and way.expected.low < way.expected.change < way.expected.high < 0
        assert any("tokens per parameter" in beyond for beyond in way.expected.beyond)


def test_a_step_is_timed_here(home):
    config = made()
    assert config.pipeline
    model = find_checkpoint("seed").metadata.model
    stage = dataclasses.replace(config.pipeline["expert_a"].config, init="seed")
    step = on_this_machine(stage, model)
    assert 0 < step.heldout_seconds < step.seconds and step.compile_seconds > 0
    assert step.memory > 12 * 1000 and step.fits


def test_the_command(home, capsys, monkeypatch):
    monkeypatch.setattr("btx_jax.planning.steps.on_this_machine", fixed)
    (home / "my.py").write_text(
        "from tests.planning.test_plan import made\n\n\ndef get_config():\n    return made()\n"
    )
    btx(["plan", "my.py", "--price=2"])
    out, err = capsys.readouterr()
    assert "expert_a" in out and "sparse upcycling" in out and "cost" in out
    assert "not tokenised yet" in err
    run = home / "runs" / "my"
    assert [path.name for path in run.iterdir()] == ["plan.json"]
    written = json.loads((run / "plan.json").read_text())
    assert next(stage["name"] for stage in written["stages"]) == "prepare"
    assert written["on"] == "this machine" and str(run / "plan.json") in out.replace("\n", "")


def test_a_full_disk_is_foreseen(home, capsys, monkeypatch):
    monkeypatch.setattr("btx_jax.planning.steps.on_this_machine", fixed)
    (home / "my.py").write_text(
        "from tests.planning.test_plan import made\n\n\ndef get_config():\n    return made()\n"
    )
    run = home / "runs" / "my"
    needed = sum(stage.storage for stage in plan(made(), run, fixed, 1).stages)

    def told(free, do):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("btx_jax.training.storage.shutil.disk_usage", lambda path: usage)
        do()
        return [line for line in capsys.readouterr().err.splitlines() if "its disk has" in line]

    def started():
        monkeypatch.setattr("btx_jax.stages.pipeline.stages.run", None)
        with pytest.raises(UserError, match="did not finish"):
            pipeline.run(made(), run)

    warned = (
        f"{run}: checkpoints may need up to {size(needed)} more, but its disk has only"
        f" {size(needed - 1)} free; free some space, or choose a --workdir on a larger disk"
    )
    assert told(needed, lambda: btx(["plan", "my.py"])) == []
    assert told(needed - 1, lambda: btx(["plan", "my.py"])) == [f"btx_jax: warning: {warned}"]
    assert told(needed - 1, started) == [warned]


def test_what_is_written_already_needs_no_more_room(home, monkeypatch):
    free = SimpleNamespace(free=100)
    monkeypatch.setattr("btx_jax.training.storage.shutil.disk_usage", lambda path: free)
    (home / "run/a").mkdir(parents=True)
    (home / "run/a/written").write_bytes(bytes(50))
    needed = {home / "run/a": 100.0, home / "run/b": 51.0}
    assert shortage(needed, home / "run").startswith(f"{home}/run: checkpoints may need up to")
    assert not shortage(needed | {home / "run/b": 50.0}, home / "run")


def test_the_command_finds_mistakes_before_it_times_anything(home, capsys, monkeypatch):
    monkeypatch.setattr("btx_jax.planning.steps.on_this_machine", None)
    (home / "a.jsonl").unlink()
    (home / "my.py").write_text(
        "from tests.planning.test_plan import made\n\n\ndef get_config():\n    return made()\n"
    )
    with pytest.raises(SystemExit):
        btx(["plan", "my.py"])
    err = capsys.readouterr().err.strip()
    assert err.count("no file matches 'a.jsonl'") == 1 and "\n" not in err
    assert "config.pipeline.prepare.config.data" in err and "(also in expert_a, " in err
    assert not (home / "runs").exists()


@pytest.mark.parametrize("name", ["demo", "bar:tiny", "comparison:tiny,all", "seed:tiny"])
def test_presets_can_be_planned(home, name):
    preset, _, argument = name.partition(":")
    config = PRESETS[preset].make(*([argument] if argument else []))
    assert isinstance(config, Config)
    monkey = plan(_without_text(config), home / "run", fixed, 1)
    assert all(stage.flops for stage in monkey.stages if stage.steps)
    assert any(stage.steps for stage in monkey.stages)


def _without_text(config):
    """With text of the test's, so that no demo corpus is made."""
    domains = dict.fromkeys(("math", "code", "world", "prose"), "a.jsonl")

    def other(stage):
        if not stage.data:
            return stage
        data = dataclasses.replace(stage.data, domains=domains, tokenizer="")
        return dataclasses.replace(stage, data=data)

    if config.pipeline is None:
        return other(config)
    changed = {
        name: dataclasses.replace(stage, config=other(stage.config))
        for name, stage in config.pipeline.items()
    }
    return dataclasses.replace(config, pipeline=changed)
