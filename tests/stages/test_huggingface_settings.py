"""Settings of Hugging Face directories through the stages: ids and settings that are carried over,
and the window that limits a mixture."""

import json
import shutil
from pathlib import Path

import jax
import pytest
import yaml

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.commands import adapter, convert, experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixConfig,
    TrainConfig,
)
from btx_jax.config.model_config import LoRAConfig
from btx_jax.parallel import sharding
from tests.conftest import ROOT, sentences

GOLDEN = ROOT / "tests" / "mixing" / "golden"
SAID = {"eos_token_id": [1, 2], "pad_token_id": 3, "router_jitter_noise": 0.1, "of_tomorrow": [1]}
GENERATION = {"eos_token_id": [1, 2, 5], "temperature": 0.6}


@pytest.fixture(autouse=True)
def one_device_only(monkeypatch):
    """These stages use one of the eight simulated devices."""
    real = sharding.make_mesh
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for module in ("btx_jax.training.start", "btx_jax.stages.mix"):
        monkeypatch.setattr(
            f"{module}.make_mesh", lambda shape, devices=None: real(shape, jax.devices()[:1])
        )


def model(directory: Path, name: str, **config) -> str:
    shutil.copytree(GOLDEN / name, directory)
    said = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(said))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    return str(directory)


def recipe(home: Path, name: str, *sources: str) -> Path:
    prompts = {"positive_prompts": ["x"]}
    values = {
        "base_model": sources[0],
        "gate_mode": "random",
        "experts": [{"source_model": source} | prompts for source in sources],
    }
    (home / f"{name}.yml").write_text(yaml.safe_dump(values))
    mix_recipe.run(str(home / f"{name}.yml"), str(home / name), output_format="huggingface")
    return home / name


def mix(home: Path, name: str, *sources: str) -> Path:
    stages.run(Config("mix", mix=MixConfig(sources, k=1), mesh=MeshConfig()), home / name)
    return home / name


def written(home: Path, source: Path) -> dict:
    """config.json of the source as a Hugging Face directory."""
    if find_checkpoint(source).is_huggingface:
        return json.loads((source / "config.json").read_text())
    convert.run(str(source), str(home / f"{source.name}_exported"))
    return json.loads((home / f"{source.name}_exported" / "config.json").read_text())


def test_the_shortest_window_or_context_limits_a_mixture_however_it_is_made(tmp_path, caplog):
    full = model(tmp_path / "full", "a")
    windowed = model(tmp_path / "windowed", "b", model_type="mistral", sliding_window=32)
    short = model(tmp_path / "short", "c", max_position_embeddings=64)
    ours = tmp_path / "windowed_ours"
    convert.run(windowed, str(ours))
    made = {
        recipe(tmp_path, "base_unwindowed", full, windowed): 32,
        recipe(tmp_path, "base_windowed", windowed, full): 32,
        recipe(tmp_path, "windowed_run", full, str(ours)): 32,
        recipe(tmp_path, "shorter", full, short): 64,
        mix(tmp_path, "mixed", full, windowed): 32,
        mix(tmp_path, "mixed_shorter", short, full): 64,
        recipe(tmp_path, "unlimited", full, str(GOLDEN / "base")): 128,
    }
    caplog.clear()
    experts.add(str(tmp_path / "unlimited"), windowed, str(tmp_path / "added"))
    assert f"the context is 32, from {windowed}, the shortest" in caplog.text
    made[tmp_path / "added"] = 32
    for path, context in made.items():
        assert find_checkpoint(path).metadata.model.context == context, path
        config = written(tmp_path, path)
        assert (config["max_position_embeddings"], config["sliding_window"]) == (context, None)


def test_a_window_that_all_sources_have_stays_however_the_mixture_is_made(tmp_path):
    windowed = {"model_type": "mistral", "sliding_window": 32}
    a, b = (model(tmp_path / name, name, **windowed) for name in "ab")
    made = [recipe(tmp_path, "recipe", a, b), mix(tmp_path, "mixed", a, b)]
    experts.add(str(tmp_path / "recipe"), a, str(tmp_path / "added"))
    for path in (*made, tmp_path / "added"):
        found = find_checkpoint(path).metadata.model
        assert (found.context, found.window) == (128, 32), path
        config = written(tmp_path, path)
        assert (config["max_position_embeddings"], config["sliding_window"]) == (128, 32)


def test_ids_and_settings_travel_through_training_mixing_and_merging(tmp_path):
    source = model(tmp_path / "source", "a", **SAID)
    other = model(tmp_path / "other", "b", eos_token_id=7)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentences(40)))
    train = Config(
        "train",
        init=source,
        lora=LoRAConfig("1", rank=(2,), k=(1,), targets=("q",), dropout=0.0),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=64),
        train=TrainConfig(steps=1, batch_size=1, warmup_steps=1, frozen="base", eval_every=0),
        data=DataConfig(str(text), sequence_length=48, cache=str(tmp_path / "cache")),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(1),
    )
    stages.run(train, tmp_path / "trained")
    adapter.export(str(tmp_path / "trained"), str(tmp_path / "adapter"))
    adapter.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    made = [
        mix(tmp_path, "mixed_adapters", str(tmp_path / "trained"), str(tmp_path / "adapter")),
        mix(tmp_path, "mixed", source, other),
        recipe(tmp_path, "recipe", source, other),
        tmp_path / "trained",
        tmp_path / "adapter",
        tmp_path / "merged",
    ]
    experts.add(str(tmp_path / "recipe"), other, str(tmp_path / "added"))
    experts.drop(str(tmp_path / "added"), 1, str(tmp_path / "dropped"))
    convert.run(str(tmp_path / "mixed"), str(tmp_path / "exported"))
    for path in (*made, tmp_path / "added", tmp_path / "dropped", tmp_path / "exported"):
        kept = find_checkpoint(path).metadata.huggingface
        assert kept["config"].items() >= SAID.items(), path
        assert kept["generation_config"] == GENERATION, path
