import dataclasses

import jax
import pytest

from btx_jax.checkpoints.training_state import CheckpointMetadata, TrainingRun
from btx_jax.config.config import TrainConfig
from btx_jax.config.config_dict import to_dict
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.errors import ConfigError
from btx_jax.models.layers import platform_dispatch
from btx_jax.models.llama import parameter_counts
from btx_jax.presets import recipes
from btx_jax.training import start

TINY = recipes.MODELS["tiny"]
SIZE = parameter_counts(TINY)[1]
TRAIN = TrainConfig(10, 2, learning_rate=0.0, warmup_steps=1)


def metadata(*runs, model=TINY):
    return CheckpointMetadata(model, 0, {str(i): run for i, run in enumerate(runs)})


def run(tokens, **more):
    return TrainingRun(tokens, 1.0, 1.0, 1, 1, **more)


@pytest.mark.parametrize(
    ("init", "pretrained"),
    [
        (metadata(), True),  # from Hugging Face, or mixed from there: origin unknown
        (metadata(run(1000)), False),
        (metadata(None), True),  # from Hugging Face
        (metadata(run(1000), None), True),
        (metadata(run(19 * SIZE)), False),
        (metadata(run(11 * SIZE), run(9 * SIZE)), True),
    ],
)
def test_what_was_trained_elsewhere_or_long_is_pretrained(init, pretrained):
    assert start.is_pretrained(init) == pretrained
    assert start.default_learning_rate(init, TINY, TRAIN) == (5e-5 if pretrained else 2e-3)
    lora = dataclasses.replace(TRAIN, frozen="base")
    assert start.default_learning_rate(init, TINY, lora) == (3e-4 if pretrained else 5e-3)


@pytest.mark.parametrize(
    ("model", "published"),
    [("llama2_7b", 3e-4), ("llama3_8b", 3e-4)],
)
def test_random_weights_get_rates_like_those_published_for_their_size(model, published):
    found = start.default_learning_rate(None, recipes.MODELS[model], TRAIN)
    assert found == pytest.approx(published, rel=0.1)
    billion = ModelConfig(32_000, 22, 2048, 5632, 32, 4, 64)
    assert start.default_learning_rate(None, billion, TRAIN) == pytest.approx(4e-4, rel=0.25)


@pytest.mark.parametrize(
    ("platform", "expert_axis", "dispatch"),
    [("tpu", 4, "einsum"), ("tpu", 1, "ragged"), ("cpu", 4, "ragged"), ("gpu", 1, "ragged")],
)
def test_einsum_is_for_tpus_that_share_experts(platform, expert_axis, dispatch):
    assert platform_dispatch("auto", platform, expert_axis) == dispatch
    for named in ("einsum", "ragged"):
        assert platform_dispatch(named, platform, expert_axis) == named


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = recipes.moe_finetune("tiny")
    return dataclasses.replace(config, init="somewhere")


def test_what_is_decided_once_stays_when_a_run_goes_on_elsewhere(config, monkeypatch):
    found = CheckpointMetadata(dataclasses.replace(TINY, moe=MoEConfig((4,) * 4)), 0, {})
    monkeypatch.setattr(start, "starting_point", lambda config: (_Found(found), found.model))
    first = start.settled(config, {})
    assert (first.compute.dispatch, first.train.learning_rate) == ("ragged", 5e-5)

    def moved(config):
        raise AssertionError("init is not looked at again")

    monkeypatch.setattr(start, "starting_point", moved)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    on_a_slice = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=1))
    monkeypatch.setattr(start, "platform_dispatch", lambda *_: "einsum")
    again = start.settled(on_a_slice, to_dict(first))
    assert (again.compute.dispatch, again.train.learning_rate) == ("ragged", 5e-5)


def test_what_is_named_wins(config, monkeypatch):
    monkeypatch.setattr(start, "starting_point", lambda config: pytest.fail("nothing to decide"))
    named = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, dispatch="einsum"),
        train=dataclasses.replace(config.train, learning_rate=2e-3),
    )
    assert start.settled(named, {}) == named


def test_another_init_is_decided_anew(config, monkeypatch):
    found = CheckpointMetadata(TINY, 0, {})
    monkeypatch.setattr(start, "starting_point", lambda config: (_Found(found), TINY))
    before = to_dict(config) | {"init": "elsewhere"}
    before["train"]["learning_rate"] = 2e-3
    assert start.settled(config, before).train.learning_rate == 5e-5


def test_a_config_for_another_model_names_the_one_that_takes_any(tmp_path, tokenizer):
    from tests.stages.test_evaluate import DENSE, checkpoint

    init = checkpoint(tmp_path / "init", DENSE, 1, tokenizer)
    config = dataclasses.replace(recipes.seed("tiny"), init=init)
    with pytest.raises(ConfigError, match="or this config's :from_init"):
        start.starting_point(config)


@dataclasses.dataclass
class _Found:
    metadata: CheckpointMetadata
