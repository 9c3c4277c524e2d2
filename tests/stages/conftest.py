import json
import logging

import jax
import pytest

from btx_jax import stages
from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    TrainConfig,
)
from btx_jax.parallel import sharding
from tests.conftest import sentences


@pytest.fixture
def one_device_only(monkeypatch):
    real = sharding.make_mesh
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for module in ("btx_jax.training.start", "btx_jax.stages.mix"):
        monkeypatch.setattr(
            f"{module}.make_mesh", lambda shape, devices=None: real(shape, jax.devices()[:1])
        )


@pytest.fixture
def training(tmp_path, tokenizer_file):
    """A config of `steps` steps with changed keys in its sections."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(200, seed=1)))

    def make(init, steps, model=None, dispatch="auto", every=100, **train):
        tokenizer = str(tokenizer_file) if model else ""
        data = DataConfig(
            "words", domains={"words": str(text)}, tokenizer=tokenizer, sequence_length=64,
            heldout_fraction=0.2, cache=str(tmp_path / "cache"),
        )  # fmt: skip
        compute = ComputeConfig(
            dtype="float32", remat="none", dispatch=dispatch, loss_chunk=64, group_size=64
        )
        given = {"learning_rate": 0.0, "warmup_steps": 1, "eval_every": 5, "eval_rows": 4} | train
        return Config(
            "train", init=str(init), model=model, compute=compute, data=data, mesh=MeshConfig(),
            train=TrainConfig(steps, 4, **given), checkpoint=CheckpointConfig(every),
        )  # fmt: skip

    return make


@pytest.fixture
def run(caplog):
    """The run's own log lines."""

    def run(config, workdir):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            stages.run(config, workdir)
        return [record.getMessage() for record in caplog.records]

    return run
