"""The mixing probe through the real stages: what it measures, when it warns, and when there is
none."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from btx_jax import progress, stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.config.config import CheckpointConfig, Config, EvaluateConfig, MeshConfig, MixConfig
from btx_jax.config.model_config import LoRAConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import ConfigError
from btx_jax.models.leaves import is_feed_forward
from btx_jax.training import watch
from tests.stages.test_evaluate import DENSE, checkpoint
from tests.stages.test_train import metrics

pytestmark = pytest.mark.usefixtures("one_device_only")


@pytest.fixture
def seed(tmp_path, tokenizer_file):
    return checkpoint(tmp_path / "seed", DENSE, 1, load_tokenizer(tokenizer_file))


@pytest.fixture
def branch(training, seed):
    """A config of six steps, evaluated and saved at every second."""

    def make(**train):
        given = {"eval_every": 2, "mixing_probe": True, "learning_rate": 1e-2} | train
        config = training(seed, 6, every=2, **given)
        return dataclasses.replace(config, checkpoint=CheckpointConfig(2, keep=9))

    return make


def probed(workdir):
    """Step -> (held-out loss of the branch, of the average, barrier)."""
    return {
        line["step"]: (line["heldout"], line.get("heldout_mixed"), line.get("barrier"))
        for line in metrics(workdir)
        if "heldout" in line
    }


def test_the_probe_is_the_loss_of_the_averaged_checkpoint(
    branch, run, tmp_path, tokenizer_file, monkeypatch
):
    monkeypatch.setattr(progress, "SECONDS", 0)
    config = branch()
    told = run(config, tmp_path / "branch")
    found = probed(tmp_path / "branch")
    assert list(found) == [0, 2, 4, 6]
    start, mixed, barrier = found[0]
    assert mixed == start and barrier == 0, "the seed, averaged with itself"

    seed = load_params(find_checkpoint(config.init))
    models = {}
    for step in (2, 4, 6):
        own = load_params(find_checkpoint(tmp_path / "branch" / "checkpoints" / str(step)))

        def averaged(path, leaf, other):
            leaf, other = np.asarray(leaf), np.asarray(other)
            return leaf if is_feed_forward(path) else (leaf + other) / 2

        home = tmp_path / f"mixed_{step}"
        checkpoints = Checkpoints(home, CheckpointConfig())
        made = jax.tree_util.tree_map_with_path(averaged, own, seed)
        checkpoints.save(CheckpointMetadata(DENSE, 0, {}), made)
        checkpoints.close()
        copy_tokenizer(load_tokenizer(tokenizer_file), home / "tokenizer")
        models[f"mixed_{step}"] = str(home)
    evaluate = EvaluateConfig(models, rows=4, batch_size=4, shown_tokens=0)
    stages.run(
        dataclasses.replace(
            config, stage="evaluate", init="", train=None, checkpoint=None, evaluate=evaluate
        ),
        tmp_path / "evaluated",
    )
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())["models"]
    for step in (2, 4, 6):
        (own,), (mixed,) = (losses.values() for losses in found[step][:2])
        alone = results[f"mixed_{step}"]
        assert mixed == {key: alone[key]["words"] for key in mixed}, "the same digits"
        assert mixed != own
        better = min(start["words"]["nats_per_token"], own["nats_per_token"])
        assert found[step][2] == pytest.approx(mixed["nats_per_token"] - better, abs=1e-12)
    line = f"branch: mixing barrier at the end: {found[6][2]:.3f} nats per token"
    assert line in told
    assert any(f", barrier {found[2][2]:.3f}" in line for line in told), "beside the loss"


def test_a_run_goes_on_with_the_same_probe(branch, run, tmp_path):
    run(branch(), tmp_path / "branch")
    whole = probed(tmp_path / "branch")
    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "4")
    (tmp_path / "branch" / "done.json").unlink()
    run(branch(), tmp_path / "branch")
    assert probed(tmp_path / "branch") == whole


def test_the_probe_changes_nothing_that_is_learnt(branch, run, tmp_path):
    for name, on in (("with", True), ("without", False)):
        run(branch(mixing_probe=on), tmp_path / name)
    one, other = (probed(tmp_path / name) for name in ("with", "without"))
    assert {step: line[0] for step, line in one.items()} == {
        step: line[0] for step, line in other.items()
    }
    assert all(line[1:] == (None, None) for line in other.values())


def test_branches_whose_shared_parts_stay_have_none(branch, run, tmp_path):
    adapted = dataclasses.replace(branch(frozen="base"), lora=LoRAConfig("2"))
    for name, config in (("shared", branch(frozen="shared")), ("lora", adapted)):
        told = run(config, tmp_path / name)
        assert all(line[1:] == (None, None) for line in probed(tmp_path / name).values())
        assert not any("barrier" in line for line in told)


def test_a_branch_that_leaves_the_basin_is_told_once_with_the_number(branch, run, tmp_path):
    gentle = run(branch(learning_rate=1e-4), tmp_path / "gentle")
    assert not any("basin" in line for line in gentle)
    brutal = run(branch(learning_rate=1.0), tmp_path / "brutal")
    spoken = [line for line in brutal if "basin" in line]
    assert len(spoken) == 2 and spoken[0] == spoken[1], "where it happens, and at the end"
    barriers = {step: line[2] for step, line in probed(tmp_path / "brutal").items()}
    step = min(step for step, barrier in barriers.items() if barrier > watch.BARRIER)
    told = f"brutal: step {step}: mixing barrier {barriers[step]:.2f} nats per token: this branch"
    assert spoken[0].startswith(told)


def test_what_has_no_seed_or_is_no_branch_is_refused_with_all_else(
    branch, training, seed, run, tmp_path
):
    mix = MixConfig((seed,), copies=4)
    stages.run(Config("mix", mix=mix, mesh=MeshConfig()), tmp_path / "mix")
    fresh = training("scratch", 6, DENSE, mixing_probe=True)
    mixture = dataclasses.replace(branch(), init=str(tmp_path / "mix"))
    for config, told in (
        (fresh, "branches cannot share random weights"),
        (mixture, "the model is already a mixture"),
    ):
        wrong = dataclasses.replace(config.data, sequence_length=4096)
        with pytest.raises(ConfigError) as refused:
            stages.run(dataclasses.replace(config, data=wrong), tmp_path / "refused")
        assert "config.train.mixing_probe: " in str(refused.value) and told in str(refused.value)
        assert "config.data.sequence_length=4096" in str(refused.value), "all at once"
    assert not (tmp_path / "refused").exists()
