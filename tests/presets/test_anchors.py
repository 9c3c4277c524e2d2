"""Branch-Adapt-Route: all of its runs, with few steps."""

import dataclasses
import json

import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.checkpoints.training_state import named_leaves
from btx_jax.config.model_config import ModelConfig
from btx_jax.presets.anchors import bar
from tests.conftest import sentences

MODEL = ModelConfig(320, 2, 32, 64, 2, 2, 16, context=64)


def small(config, home, tokenizer_file):
    """The same run on sentences, with a model and steps that take seconds."""
    if config.data:
        domains = {name: str(home / f"{name}.jsonl") for name in config.data.domains}
        tokenizer = str(tokenizer_file) if config.data.tokenizer else ""
        data = dataclasses.replace(
            config.data, domains=domains, tokenizer=tokenizer, sequence_length=32,
            heldout_fraction=0.2, cache=str(home / "cache"),
        )  # fmt: skip
        config = dataclasses.replace(config, data=data)
    if config.train:
        steps = {"steps": 2, "warmup_steps": 1, "eval_every": 0}
        train = dataclasses.replace(config.train, learning_rate=1e-2, **steps)
        config = dataclasses.replace(config, train=train)
    return dataclasses.replace(config, model=config.model and MODEL)


@pytest.mark.slow
def test_its_runs_follow_each_other(tmp_path, tokenizer_file):
    for number, name in enumerate(("math", "code", "world", "prose")):
        rows = (json.dumps({"text": text}) + "\n" for text in sentences(60, seed=number))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    pipeline = {
        name: dataclasses.replace(stage, config=small(stage.config, tmp_path, tokenizer_file))
        for name, stage in bar("tiny").pipeline.items()
    }
    stages.run(dataclasses.replace(bar("tiny"), pipeline=pipeline), tmp_path / "run")

    def params(name):
        return named_leaves(load_params(find_checkpoint(tmp_path / "run" / name)))

    def moved(name, since):
        one, other = params(name), params(since)
        return {leaf for leaf in one if not np.array_equal(one[leaf], other[leaf])}

    own = {f"layers_0/ffn/{part}" for part in ("gate", "up", "down", "router", "router_bias")}
    first, second, last = "expert_math_shared", "expert_math_shared_layers", "expert_math"
    assert moved(second, first) == {*own, "embed/embedding", "head/kernel"}
    everything = set(params(last))
    anchor = {leaf for leaf in everything if "/anchor/" in leaf}
    assert moved(last, second) == everything - anchor and anchor
    assert moved("finetune", "mix") == {"layers_0/ffn/router", "layers_0/ffn/router_bias"}
    seed, mix = params("seed"), params("mix")
    for leaf in anchor:
        assert np.array_equal(mix[leaf], seed[leaf.replace("anchor", "ffn")]), leaf
    assert (tmp_path / "run" / "report" / "report.html").exists()
