import dataclasses
import json

import jax
import numpy as np
import pytest

from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints, TrainingRun
from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    MeshConfig,
    OracleConfig,
    TaskConfig,
)
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.data.tokenizers import copy_tokenizer, find_tokenizer, load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.models.llama import init_params
from btx_jax.stages import evaluate, report
from tests.conftest import sentences

DENSE = ModelConfig(320, 2, 32, 64, 2, 2, 16, context=128)
MIXTURE = dataclasses.replace(DENSE, moe=MoEConfig((4, 4)))


def checkpoint(folder, model, seed, tokenizer):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    history = {f"run{seed}": TrainingRun(100 * seed, 1.0, 2.0, 1, 3)}
    checkpoints.save(
        CheckpointMetadata(model, 0, history),
        jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(seed))),
    )
    checkpoints.close()
    copy_tokenizer(tokenizer, folder / "tokenizer")
    return str(folder)


@pytest.fixture
def config(tmp_path, tokenizer):
    files = {}
    for number, name in enumerate(("a", "b")):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in sentences(60, seed=number))
        )
    choice = [{"q": "the river", "choices": ["city", "paper x"], "gold": 0}] * 3
    number = [{"q": "1 + 1 =", "answer": "2"}]
    code = [
        {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(1) == 1", "entry_point": "f"}
    ]
    for name, rows in (("choice", choice), ("number", number), ("code", code)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {
        "seed": checkpoint(tmp_path / "seed", DENSE, 1, tokenizer),
        "expert_a": checkpoint(tmp_path / "expert_a", DENSE, 2, tokenizer),
        "btx": checkpoint(tmp_path / "btx", MIXTURE, 3, tokenizer),
    }
    domains = {name: str(file) for name, file in files.items()}
    members = {"seed": "b", "expert_a": "a"}
    return Config(
        "evaluate",
        data=DataConfig(
            "a,b",
            heldout="a,b",
            domains=domains,
            sequence_length=64,
            heldout_fraction=0.2,
            cache=str(tmp_path / "cache"),
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=64),
        mesh=MeshConfig(fsdp=2, expert=2, data=2),
        evaluate=EvaluateConfig(
            models,
            tasks={
                "choice": TaskConfig("multiple_choice", str(tmp_path / "choice.jsonl"), "{q}"),
                "number": TaskConfig(
                    "exact_match", str(tmp_path / "number.jsonl"), "{q}", max_tokens=4
                ),
                "code": TaskConfig(
                    "code", str(tmp_path / "code.jsonl"), "{prompt}", max_tokens=4, seconds=2
                ),
            },
            ensembles={
                "btm": EnsembleConfig(members, "tf_idf", 1),
                "bayes": EnsembleConfig(members, "bayes_updating"),
            },
            oracles={"told": OracleConfig("btx", {"a": 0, "b": 3})},
            texts={"own": "the river <script>"},
            shown_tokens=10,
        ),
    )


def test_everything_is_evaluated_over_a_mesh_and_goes_on_where_it_was(
    config, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "out"
    roles = {"seed": "seed", "experts": ("expert_a",), "mixture": "btx"}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **roles))
    evaluate.run(config, workdir)
    results = json.loads((workdir / "results.json").read_text())
    assert results["roles"] == {"seed": "seed", "experts": ["expert_a"], "mixture": "btx"}
    shown = capsys.readouterr().out
    assert "held-out loss" in shown and "test sets" in shown
    mean = np.mean(list(results["models"]["btx"]["nats_per_token"].values()))
    assert f"{mean:.3f}" in shown
    models = results["models"]
    assert list(models) == ["seed", "expert_a", "btx", "btm", "bayes", "told"]
    for name, model in models.items():
        assert set(model["nats_per_token"]) == {"a", "b"}
        assert all(np.isfinite(list(model["nats_per_token"].values()))), name
    assert models["btm"]["tokens"] == 300
    assert models["btm"]["params_active"] == models["seed"]["params_active"]
    assert models["told"]["tokens"] == models["btx"]["tokens"]
    assert models["told"]["nats_per_token"] != models["btx"]["nats_per_token"]
    for name in ("seed", "expert_a", "btx"):
        assert set(models[name]["tasks"]) == {"choice", "number", "code"}
        assert models[name]["tasks"]["choice"]["accuracy"] in (0, 1)
        assert 0 <= models[name]["tasks"]["code"]["pass@1"] <= 1
    routing = models["btx"]["routing"]
    assert set(routing["texts"]) == {"a", "b", "own"}
    assert "".join(routing["texts"]["own"]["pieces"]) == "the river <script>"
    assert len(routing["texts"]["a"]["pieces"]) == 10
    assert len(routing["mutual_information"]) == len(routing["redundancy"]) == 2
    assert "routing" not in models["seed"]

    # Simulate a kill after the first model: its results stay, the rest is repeated.
    for file in (
        workdir / "done.json",
        workdir / "results.json",
        workdir / "parts" / "btx" / "result.json",
    ):
        file.unlink()
    kept = (workdir / "parts" / "seed" / "result.json").stat().st_mtime_ns
    seen = []
    real = evaluate.token_losses
    monkeypatch.setattr(evaluate, "token_losses", lambda *args: seen.append(1) or real(*args))
    evaluate.run(config, workdir)
    assert len(seen) == 2, "the mixture on two domains, nothing else"
    assert (workdir / "parts" / "seed" / "result.json").stat().st_mtime_ns == kept
    assert json.loads((workdir / "results.json").read_text()) == results

    # Other weights, other items: earlier results do not apply.
    (tmp_path / "seed" / "checkpoints" / "0" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(
        UserError,
        match=r"models\.seed: differs from what was measured there before;"
        " choose another directory",
    ):
        evaluate.run(config, workdir)


def test_one_device_and_eight_give_the_same_losses(config, tmp_path):
    few = dataclasses.replace(config.evaluate, tasks={}, texts={})
    evaluate.run(dataclasses.replace(config, evaluate=few), tmp_path / "eight")
    spread = json.loads((tmp_path / "eight" / "results.json").read_text())["models"]
    from btx_jax.parallel import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluate, "make_mesh", lambda shape: sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
        )
        evaluate.run(dataclasses.replace(config, evaluate=few), tmp_path / "one")
    alone = json.loads((tmp_path / "one" / "results.json").read_text())["models"]
    for name, model in spread.items():
        assert model["nats_per_token"] == pytest.approx(alone[name]["nats_per_token"], rel=1e-5)
        assert model.get("routing", {}).get("texts") == alone[name].get("routing", {}).get("texts")


def test_wrong_settings_are_refused_before_any_model_is_read(config, tmp_path):
    with pytest.raises(
        ConfigError, match=r"ensembles\.x\.experts: no model 'expert_b'; did you mean 'expert_a'"
    ):
        dataclasses.replace(
            config.evaluate, ensembles={"x": EnsembleConfig({"seed": "a", "expert_b": "b"})}
        )
    with pytest.raises(ConfigError, match=r"pass_at=\(1, 5\): each must lie in 1 .. samples=2"):
        TaskConfig("code", "f", "p", samples=2, temperature=1.0, pass_at=(1, 5))
    for oracle, said in (
        (OracleConfig("bt", {}), r"oracles\.x\.mixture: no model 'bt'; did you mean 'btx'"),
        (
            OracleConfig("btx", {"a": 0}),
            r"oracles\.x\.experts: b: the domains must be exactly those of the held-out",
        ),
        (
            OracleConfig("btx", {"a": 0, "b": 4}),
            r"oracles\.x\.experts\.b: btx: not every layer has an expert 4",
        ),
        (OracleConfig("seed", {"a": 0, "b": 0}), r"seed: not a mixture; name one"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate.run(
                dataclasses.replace(
                    config, evaluate=dataclasses.replace(config.evaluate, oracles={"x": oracle})
                ),
                tmp_path / "x",
            )
    task = TaskConfig("multiple_choice", str(tmp_path / "nothing.jsonl"), "{q}")
    with pytest.raises(UserError, match=r"config\.evaluate\.tasks\.t\.file: no file"):
        evaluate.run(
            dataclasses.replace(
                config, evaluate=dataclasses.replace(config.evaluate, tasks={"t": task})
            ),
            tmp_path / "x",
        )
    short = checkpoint(
        tmp_path / "short",
        dataclasses.replace(DENSE, context=32),
        4,
        load_tokenizer(find_tokenizer(tmp_path / "seed" / "tokenizer")),
    )
    with pytest.raises(
        ConfigError, match=r"sequence_length=64: config\.evaluate\.models\.s has a context of 32"
    ):
        evaluate.run(
            dataclasses.replace(config, evaluate=EvaluateConfig({"s": short})), tmp_path / "w"
        )
    task = dataclasses.replace(config.evaluate.tasks["number"], max_tokens=32)
    with pytest.raises(
        ConfigError,
        match=r"tasks\.n\.max_tokens=32: config\.evaluate\.models\.s has a context of 32",
    ):
        evaluate.run(
            dataclasses.replace(
                config, data=None, evaluate=EvaluateConfig({"s": short}, tasks={"n": task})
            ),
            tmp_path / "v",
        )
    small = checkpoint(
        tmp_path / "small",
        dataclasses.replace(DENSE, vocab_size=300),
        4,
        load_tokenizer(find_tokenizer(tmp_path / "seed" / "tokenizer")),
    )
    with pytest.raises(
        UserError, match=r"models\.s: domain '\w+': .* has id 3\d\d, .* only 300 embeddings"
    ):
        evaluate.run(
            dataclasses.replace(config, evaluate=EvaluateConfig({"s": small})), tmp_path / "z"
        )


def test_prompts_are_continued_as_by_generate(config, tmp_path):
    from btx_jax.commands.generate import generate

    prompts = ("the river", "def <b>")
    wanted = dataclasses.replace(
        config.evaluate, tasks={}, ensembles={}, oracles={}, prompts=prompts, prompt_tokens=12
    )
    config = dataclasses.replace(config, evaluate=wanted)
    evaluate.run(config, tmp_path / "out")
    models = json.loads((tmp_path / "out/results.json").read_text())["models"]
    for name, path in config.evaluate.models.items():
        for prompt, sample in zip(prompts, models[name]["samples"], strict=True):
            parts = []
            generate(path, prompt, parts.append, max_tokens=12)
            assert (sample["prompt"], sample["text"]) == (prompt, "".join(parts)), name
            assert ("explained" in sample) == (name == "btx")
    shown = models["btx"]["samples"][0]["explained"]
    assert "".join(shown["pieces"]).startswith("the river")
    assert len(shown["experts"][0]) == len(shown["pieces"])
    report.report([str(tmp_path / "out")], str(tmp_path / "page"))
    page = (tmp_path / "page/report.html").read_text()
    assert "<h3>def &lt;b&gt;</h3>" in page and 'data-text="sample 2"' in page
    other = dataclasses.replace(wanted, prompts=("another",))
    with pytest.raises(UserError):
        evaluate.run(dataclasses.replace(config, evaluate=other), tmp_path / "out")


def test_prompts_alone_are_something_to_evaluate(config, tmp_path):
    wanted = EvaluateConfig(config.evaluate.models, prompts=("the",), prompt_tokens=3)
    evaluate.run(dataclasses.replace(config, data=None, evaluate=wanted), tmp_path / "out")
    models = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert all(len(model["samples"]) == 1 for model in models.values())
    with pytest.raises(ConfigError, match=r"prompts\[0\]: empty"):
        dataclasses.replace(wanted, prompts=("",))
    long = dataclasses.replace(wanted, prompt_tokens=128)
    with pytest.raises(ConfigError, match="prompt_tokens=128"):
        evaluate.run(dataclasses.replace(config, data=None, evaluate=long), tmp_path / "long")
