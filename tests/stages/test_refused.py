"""A run is refused before any work, with all mistakes at once, and nothing is left behind."""

import copy
import dataclasses
import json

import pytest

from btx_jax import stages
from btx_jax.config.config import (
    Config,
    EvaluateConfig,
    MeshConfig,
    MixConfig,
    PipelineStage,
    ReportConfig,
    TaskConfig,
    TrainConfig,
)
from btx_jax.config.config_dict import from_dict, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.presets import recipes
from btx_jax.stages import pipeline
from tests.conftest import sentences

MODEL = ModelConfig(320, 2, 32, 64, 2, 2, 16, context=64)


@pytest.fixture
def home(tmp_path, tokenizer_file):
    rows = (json.dumps({"text": text}) + "\n" for text in sentences(30))
    (tmp_path / "text.jsonl").write_text("".join(rows))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.model").write_bytes(b"no tokenizer")
    (tmp_path / "good.model").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "items.jsonl").write_text('{"choices": "abc", "gold": 0, "q": "x"}\n')
    return tmp_path


def training(home, **changes):
    """A tiny run that would start, with changes such as data__train="x"."""
    config = recipes.seed("tiny")
    data = dataclasses.replace(
        config.data,
        train=str(home / "text.jsonl"),
        tokenizer=str(home / "good.model"),
        cache=str(home / "cache"),
        sequence_length=64,
        heldout="",
        domains={},
    )
    train = TrainConfig(3, 8, warmup_steps=1)
    values = to_dict(dataclasses.replace(config, model=MODEL, data=data, train=train))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        target = values
        for name in parents:
            target = target[name]
        target[leaf] = value
    return from_dict(Config, values)


def everything(home):
    return {
        path: None if path.is_dir() else (path.read_bytes(), path.stat().st_mtime_ns)
        for path in home.rglob("*")
    }


def refused(home, config, workdir="deep/er/run"):
    """The refusal's message, after checking that nothing has changed."""
    before = everything(home)
    with pytest.raises(UserError) as error:
        stages.run(config, home / workdir)
    assert everything(home) == before, "something was left behind"
    return str(error.value)


REFUSALS = [
    ({"init": "/nowhere"}, "config.init: /nowhere does not exist"),
    ({"init": ""}, "config.init: missing"),
    ({"data__train": "/nowhere/*.txt"}, "config.data.train: no file matches '/nowhere/*.txt'"),
    ({"data__heldout": "/nowhere"}, "config.data.heldout: no file matches '/nowhere'"),
    ({"data__train": "demo:maths"}, "no demo corpus 'maths'; did you mean 'math'?"),
    ({"data__tokenizer": "/nowhere"}, "config.data.tokenizer: /nowhere does not exist"),
    ({"mesh__fsdp": 3}, "config.mesh: data=1 fsdp=3"),
    ({"train__batch_size": 12}, "config.train.batch_size=12: its micro-batches of 12"),
    ({"data__sequence_length": 128}, "config.data.sequence_length=128: longer than"),
    ({"model__vocab_size": 300}, "config.model.vocab_size=300: the tokenizer has 320 pieces"),
    (
        {"train__frozen": "experts"},
        "config.train.frozen='experts': the model has no experts; leave it out",
    ),
]


@pytest.mark.parametrize(("change", "told"), REFUSALS, ids=[told[:40] for _, told in REFUSALS])
def test_a_refused_run_leaves_nothing_behind(home, change, told):
    assert told in refused(home, training(home, **change))


@pytest.mark.parametrize("key", ["data__tokenizer", "data__train"])
def test_nor_does_one_whose_files_cannot_be_used(home, key):
    bad = {"data__tokenizer": home / "bad.model", "data__train": home / "empty.txt"}[key]
    told = refused(home, training(home, **{key: str(bad)}))
    assert str(bad) in told


def test_a_directory_that_was_there_is_as_it_was(home):
    workdir = home / "mine"
    workdir.mkdir()
    assert "config.init" in refused(home, training(home, init="/nowhere"), "mine")
    (workdir / "notes.txt").write_text("mine")
    assert "config.init" in refused(home, training(home, init="/nowhere"), "mine")
    (workdir / "config.json").write_text(json.dumps(to_dict(training(home))))
    assert "fsdp=3" in refused(home, training(home, mesh__fsdp=3), "mine")
    told = refused(home, training(home, train__learning_rate=0.5, mesh__fsdp=3), "mine")
    assert "a different config: train.learning_rate" in told


def test_all_that_is_wrong_with_a_run_is_told_at_once(home):
    told = refused(
        home,
        training(
            home, data__train="/a,/b", data__heldout="/c", data__tokenizer="/d", mesh__fsdp=3,
            data__sequence_length=128,
        ),
    )  # fmt: skip
    assert told.startswith("6 mistakes: (1) config.mesh: ")
    for number, word in enumerate(("mesh", "sequence_length=128", "'/a'", "'/b'", "'/c'", "/d")):
        assert word in told.split(f"({number + 1}) ")[1], word


def test_other_stages_are_refused_as_cleanly(home):
    mix = Config("mix", mix=MixConfig(("/a", "/b")), mesh=MeshConfig(fsdp=3))
    assert refused(home, mix).startswith("3 mistakes: (1) config.mix.experts[0]: /a does not exist")
    items = TaskConfig("multiple_choice", str(home / "items.jsonl"), "{q}")
    evaluate = Config(
        "evaluate",
        evaluate=EvaluateConfig({"m": "/m", "n": "/n"}, tasks={"t": items}),
        compute=training(home).compute,
        mesh=MeshConfig(),
    )
    told = refused(home, evaluate)
    assert "config.evaluate.models.m: /m" in told and "config.evaluate.models.n: /n" in told
    assert "choices='abc': must be a list of texts" in told
    report = Config("report", report=ReportConfig("/e", others=("/f",)))
    told = refused(home, report)
    assert "config.report.evaluate: /e/results.json" in told and "others[0]: /f" in told
    prepare = Config("prepare", data=training(home, data__train="/nowhere").data)
    assert "config.data.train: no file matches" in refused(home, prepare)


def pipeline_of(home, **changes):
    """seed -> a, b -> mix -> evaluate -> report, with changes such as a={...}."""
    seed = training(home, **changes.get("seed", {}))
    branches = {name: training(home, init="@seed", **changes.get(name, {})) for name in ("a", "b")}
    branches = {name: dataclasses.replace(branch, model=None) for name, branch in branches.items()}
    mix = MixConfig(**{"experts": ("@a", "@b"), **changes.get("mix", {})})
    found = {
        "seed": PipelineStage(seed),
        **{name: PipelineStage(branch, ("seed",)) for name, branch in branches.items()},
        "mix": PipelineStage(Config("mix", mix=mix, mesh=MeshConfig()), ("a", "b")),
        "finetune": PipelineStage(
            dataclasses.replace(
                training(home, init="@mix", **changes.get("finetune", {})), model=None
            ),
            ("mix",),
        ),
        "report": PipelineStage(Config("report", report=ReportConfig("@mix")), ("mix",)),
    }
    return Config("pipeline", pipeline=found)


def test_a_pipeline_s_mistakes_are_found_before_its_first_stage_runs(home, monkeypatch):
    ran = []
    monkeypatch.setattr(pipeline.stages, "run", lambda config, path, **_: ran.append(path.name))
    run = pipeline.run
    config = pipeline_of(
        home,
        a={"data__train": "/nowhere"},
        b={"data__sequence_length": 128},  # more than the context that seed will have
        mix={"method": "blend", "chunks": 1, "k": 1},
        finetune={"train__batch_size": 12, "train__frozen": "base"},
    )
    before = everything(home)
    with pytest.raises(UserError) as error:
        run(config, home / "P")
    assert [told.partition(": ")[0] for told in error.value.args] == [
        "config.pipeline.a.config.data.train",
        "config.pipeline.b.config.data.sequence_length=128",
        "config.pipeline.finetune.config.train.batch_size=12",
        "config.pipeline.finetune.config.train.frozen='base'",
    ]
    assert ran == [] and everything(home) == before
    run(pipeline_of(home), home / "P")
    assert ran == ["seed", "a", "b", "mix", "finetune", "report"], "a right one runs"


def test_names_that_a_stage_may_not_use_are_all_told(home):
    config = pipeline_of(home)
    stages_of = copy.copy(dict(config.pipeline))
    for name in ("a", "b"):
        stages_of[name] = dataclasses.replace(stages_of[name], needs=())
    broken = dataclasses.replace(config, pipeline=stages_of)
    with pytest.raises(UserError) as error:
        pipeline.run(broken, home / "P")
    assert len(error.value.args) == 2
    assert "config.pipeline.a: uses @seed, which is not listed in its needs (none)" in str(
        error.value
    )
    assert not (home / "P").exists()


def test_a_stage_that_has_finished_needs_its_sources_no_more(home, monkeypatch):
    monkeypatch.setattr(pipeline.stages, "run", lambda *_, **__: None)
    config = pipeline_of(home, seed={"data__train": "/gone"})
    (home / "P" / "seed").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.pipeline\.seed\.config\.data\.train: no file"):
        pipeline.run(config, home / "P")
    (home / "P" / "seed" / "done.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"config\.pipeline\.a\.config\.init: .*seed is not a checkpoint"
    ):
        pipeline.run(config, home / "P")
