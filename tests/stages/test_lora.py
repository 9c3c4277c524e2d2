"""LoRA experts through the real stages: trained, killed, resumed, mixed, gated, evaluated,
reported."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import adapter_tensors, digest, find_checkpoint, load_params
from btx_jax.checkpoints.training_state import Checkpoints, stored
from btx_jax.commands import adapter
from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FormatConfig,
    MeshConfig,
    MixConfig,
    ReportConfig,
    TaskConfig,
    TrainConfig,
)
from btx_jax.config.model_config import LoRAConfig
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.models.llama import init_params
from btx_jax.parallel import sharding
from btx_jax.stages import evaluate as evaluate_stage
from btx_jax.training.optimizer import make_optimizer
from tests.stages.test_evaluate import DENSE, MIXTURE, checkpoint

LORA = LoRAConfig("1", rank=(2,), k=(1,), targets=("q", "down"), dropout=0.0)
MORE = (
    "--config.lora.allocation=2,3",
    "--config.data.sequence_length=64",
    "--config.train.warmup_steps=2",
    "--config.train.eval_every=0",
)


def items(file, words=("river", "city")):
    rows = [
        {"query": f"Item {i}: the {words[i % 2]}?", "choices": ["paper", words[i % 2]], "gold": 1}
        for i in range(80)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def base(tmp_path, tokenizer):
    return checkpoint(tmp_path / "base", DENSE, 1, tokenizer)


def training(base, file, tmp_path, lora=LORA, steps=4, **train):
    text = FormatConfig("{query}", " {choice}")
    return Config(
        "train", init=str(base), lora=lora, compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=64),
        train=TrainConfig(**({"steps": steps, "batch_size": 2, "warmup_steps": 1, "learning_rate": 0.02, "frozen": "base"} | train)),
        data=DataConfig(f"{file}#@text", formats={"text": text}, sequence_length=48, heldout_fraction=0.1, cache=str(tmp_path / "cache")),
        mesh=MeshConfig(), checkpoint=CheckpointConfig(100),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_device_only(monkeypatch):
    """These stages use one of the eight simulated devices."""
    real = sharding.make_mesh
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for module in ("btx_jax.training.start", "btx_jax.stages.evaluate", "btx_jax.stages.mix"):
        monkeypatch.setattr(
            f"{module}.make_mesh", lambda shape, devices=None: real(shape, jax.devices()[:1])
        )


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if "lm_loss" in line]


@pytest.mark.slow
@pytest.mark.cli
def test_a_killed_run_goes_on_exactly_and_the_base_keeps_every_bit(cli):
    cli.run(*cli.seed("base", steps=3, every=3))
    base = digest(load_params(find_checkpoint(cli.home / "base")))
    file = items(cli.home / "items.jsonl")

    def run(name, *more):
        return (
            "--config=configs/mola.py", f"--config.init={cli.home / 'base'}", f"--workdir={cli.home / name}",
            f"--config.data.train={file}#@arc_easy", f"--config.data.cache={cli.home / 'cache'}", "--config.train.steps=24",
            "--config.checkpoint.every=5", *MORE, *more,
        )  # fmt: skip

    cli.run(*run("whole"))
    process = cli.start(*run("killed"))
    cli.wait_for_step("killed", 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < cli.steps_logged("killed")[-1] < 24, "killed too late to show anything"
    cli.run(*run("killed"))
    assert cli.steps_logged("killed") == list(range(1, 25))
    one, other = (adapter_tensors(find_checkpoint(cli.home / name)) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert digest(load_params(find_checkpoint(cli.home / "base"))) == base
    held = {path.name for path in (cli.home / "whole" / "checkpoints" / "24").iterdir()}
    assert {"params", "opt_state", "data", "about"} <= held

    adapter.export(str(cli.home / "whole"), str(cli.home / "exported"))
    exported = adapter_tensors(find_checkpoint(cli.home / "exported"))
    assert all(np.array_equal(one[name], exported[name]) for name in one)
    assert "k=3: more than the 2 experts" in cli.fails(*run("many", "--config.lora.k=(3,)"))


@pytest.mark.parametrize(
    ("change", "train", "told"),
    [
        ({}, {"frozen": ""}, "the optimizer would hold parameters of the base"),
        ({}, {"frozen": "experts"}, "the optimizer would hold parameters of the base"),
        ({}, {"frozen": "all_but_routers"}, "plain LoRA has no router to train; set it to 'base'"),
        (None, {}, "there are no LoRA experts to train"),
        ({"allocation": "1,1,1"}, {}, "config.lora: allocation='1,1,1': 3 numbers for 2 layers"),
        ({"k": (2,)}, {}, "k=2: more than the 1 expert of layer 0"),
    ],
)
def test_a_wrong_config_fails_before_anything_is_compiled(change, train, told, base, tmp_path):
    lora = None if change is None else dataclasses.replace(LORA, **change)
    with pytest.raises(ConfigError, match=told):
        stages.run(
            training(base, items(tmp_path / "a.jsonl"), tmp_path, lora, **train), tmp_path / "out"
        )


def test_a_resumed_run_refuses_moments_of_other_leaves_and_another_base(base, tmp_path):
    config = training(base, items(tmp_path / "a.jsonl"), tmp_path, steps=2)
    stages.run(config, tmp_path / "run")
    other = training(
        tmp_path / "run", tmp_path / "a.jsonl", tmp_path, dataclasses.replace(LORA, rank=(3,))
    )
    with pytest.raises(ConfigError, match=r"differs from the LoRA experts of the checkpoint: rank"):
        stages.run(other, tmp_path / "out")
    metadata = find_checkpoint(tmp_path / "run").metadata
    whole = init_params(metadata.model, jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
    abstract = jax.eval_shape(make_optimizer(config.train).init, whole)
    with pytest.raises(
        UserError, match=r"this run trains parameters without stored optimizer state: .*embedding"
    ):
        checkpoints.restore(2, stored(whole, metadata), abstract)
    checkpoints.close()
    (tmp_path / "run" / "done.json").unlink()
    checkpoint(tmp_path / "else", DENSE, 5, load_tokenizer(tmp_path / "base" / "tokenizer"))
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "else").rename(tmp_path / "base")
    with pytest.raises(UserError, match="was trained on a base with digest"):
        stages.run(config, tmp_path / "run")


def test_only_answers_are_learnt_and_prompts_are_read(base, tmp_path):
    """The answer repeats a word of the prompt, so it can be learnt only by reading masked
    tokens."""
    config = training(
        base,
        items(tmp_path / "a.jsonl"),
        tmp_path,
        LoRAConfig("2", rank=(4,), dropout=0.0),
        steps=30,
    )
    stages.run(config, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < 0.5 * found[0]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["tokens"] < 0.6 * 2 * 48, "targets are the answers alone"


def test_branches_become_one_mixture_whose_routers_are_trained_afterwards(base, tmp_path):
    branches = []
    for name, words in (("a", ("river", "city")), ("b", ("x", "y"))):
        stages.run(
            training(base, items(tmp_path / f"{name}.jsonl", words), tmp_path), tmp_path / name
        )
        branches.append(str(tmp_path / name))
    stages.run(
        Config("mix", mix=MixConfig(tuple(branches)), mesh=MeshConfig(fsdp=1)), tmp_path / "mix"
    )
    mixed = find_checkpoint(tmp_path / "mix")
    assert (
        mixed.metadata.model.lora.gating,
        mixed.metadata.model.lora.allocation,
        mixed.metadata.model.lora.k,
    ) == ("top_k", "2,2", (2,))
    held = [adapter_tensors(find_checkpoint(path)) for path in (*branches, tmp_path / "mix")]
    for name, tensor in held[0].items():
        np.testing.assert_array_equal(held[2][name], np.concatenate([tensor, held[1][name]]))
    tune = training(
        tmp_path / "mix", tmp_path / "a.jsonl", tmp_path, None, frozen="all_but_routers"
    )
    stages.run(tune, tmp_path / "tuned")
    tuned = adapter_tensors(find_checkpoint(tmp_path / "tuned"))
    for name, tensor in tuned.items():
        assert np.array_equal(tensor, held[2][name]) != name.endswith("router"), name
    costs = find_checkpoint(tmp_path / "tuned").metadata.costs()
    assert costs["tokens"] == 100 + 3 * 4 * 2 * 48, "the base's, two branches' and the routers'"

    both = EvaluateConfig(
        {"tuned": str(tmp_path / "tuned"), "base": base}, shown_tokens=0, rows=4, batch_size=2
    )
    config = dataclasses.replace(
        tune, stage="evaluate", init="", train=None, checkpoint=None, evaluate=both
    )
    stages.run(config, tmp_path / "evaluate")
    found = json.loads((tmp_path / "evaluate" / "results.json").read_text())["models"]["tuned"][
        "lora"
    ]
    assert found["experts"] == [2, 2]
    assert set(found["redundancy"]) == {"q", "down"}
    assert sum(found["domains"]["text"]["q"][1]["load"]) == pytest.approx(1)
    assert sum(found["domains"]["text"]["q"][1]["gate"]) == pytest.approx(1)
    stages.run(
        Config("report", report=ReportConfig(str(tmp_path / "evaluate"))), tmp_path / "report"
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "LoRA experts" in page
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["lora"]["tuned"] == found


def test_gates_trained_behind_finished_experts_choose_by_cosine(base, tmp_path):
    gated = []
    for name, words in (("a", ("river", "city")), ("b", ("x", "y")), ("c", ("print", "def"))):
        file = items(tmp_path / f"{name}.jsonl", words)
        stages.run(training(base, file, tmp_path), tmp_path / name)
        gate = training(
            tmp_path / name,
            file,
            tmp_path,
            dataclasses.replace(LORA, gating="sigmoid"),
            frozen="all_but_routers",
        )
        stages.run(gate, tmp_path / f"{name}_gate")
        before, after = (
            adapter_tensors(find_checkpoint(tmp_path / f)) for f in (name, f"{name}_gate")
        )
        assert all(np.array_equal(before[key], after[key]) for key in before)
        assert after["layers.0.q.router"].shape == (1, 32)
        gated.append(str(tmp_path / f"{name}_gate"))
    stages.run(
        Config("mix", mix=MixConfig(tuple(gated)), mesh=MeshConfig(fsdp=1)), tmp_path / "mix"
    )
    mixed = find_checkpoint(tmp_path / "mix")
    assert (mixed.metadata.model.lora.gating, mixed.metadata.model.lora.allocation) == (
        "cosine",
        "3,3",
    )
    rows = [adapter_tensors(find_checkpoint(path))["layers.1.down.router"][0] for path in gated]
    np.testing.assert_array_equal(adapter_tensors(mixed)["layers.1.down.router"], np.stack(rows))


def test_tasks_in_turn_are_measured_and_told(base, tmp_path):
    tasks, models, before = {}, {}, base
    for name, words in (("a", ("river", "city")), ("b", ("x", "y"))):
        file = items(tmp_path / f"{name}.jsonl", words)
        stages.run(
            training(before, file, tmp_path, LORA if before == base else None), tmp_path / name
        )
        models[name], before = str(tmp_path / name), str(tmp_path / name)
        tasks[name] = TaskConfig("multiple_choice", str(file), "{query}", heldout_fraction=0.1)
    config = training(base, tmp_path / "a.jsonl", tmp_path, None)
    evaluate = EvaluateConfig(models, tasks=tasks, shown_tokens=0, rows=2, batch_size=2)
    stages.run(
        dataclasses.replace(
            config, stage="evaluate", init="", train=None, checkpoint=None, evaluate=evaluate
        ),
        tmp_path / "evaluate",
    )
    parts = json.loads((tmp_path / "evaluate" / evaluate_stage.PARTS / "a" / "a.json").read_text())
    assert 0 < len(parts["items"]) < 25, "what training saw is not tried"
    report = ReportConfig(str(tmp_path / "evaluate"), continual=("a:a", "b:b"))
    stages.run(Config("report", report=report), tmp_path / "report")
    found = json.loads((tmp_path / "report" / "summary.json").read_text())["continual"]
    assert (
        found["performance_drop"]
        == pytest.approx(found["backward_transfer"])
        == pytest.approx(found["scores"][1][0] - found["scores"][0][0])
    )
    assert "performance drop" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(UserError, match="no model 'c'"):
        stages.run(
            Config("report", report=dataclasses.replace(report, continual=("a:a", "c:b"))),
            tmp_path / "wrong",
        )


def test_what_cannot_be_mixed_is_refused(base, tmp_path, tokenizer):
    file = items(tmp_path / "a.jsonl")
    stages.run(training(base, file, tmp_path, steps=1), tmp_path / "a")
    stages.run(
        training(base, file, tmp_path, dataclasses.replace(LORA, rank=(3,)), steps=1),
        tmp_path / "other_rank",
    )
    second = checkpoint(tmp_path / "base2", DENSE, 2, tokenizer)
    stages.run(training(second, file, tmp_path, steps=1), tmp_path / "other_base")
    mixture = checkpoint(tmp_path / "mixture", MIXTURE, 3, tokenizer)
    for number, (mix, told) in enumerate(
        (
            (
                MixConfig((str(tmp_path / "a"), str(tmp_path / "other_rank"))),
                r"LoRA experts differ from those of .*rank",
            ),
            (
                MixConfig((str(tmp_path / "a"), str(tmp_path / "other_base"))),
                "a different base from",
            ),
            (MixConfig((str(tmp_path / "a"), base)), "adapters and whole models"),
            (
                MixConfig((str(tmp_path / "a"), str(tmp_path / "a")), method="average"),
                "method='btx'",
            ),
        )
    ):
        with pytest.raises(ConfigError, match=told):
            stages.run(Config("mix", mix=mix, mesh=MeshConfig(fsdp=1)), tmp_path / f"out{number}")
    with pytest.raises(ConfigError, match="use its attention"):
        stages.run(training(mixture, file, tmp_path), tmp_path / "inside")
