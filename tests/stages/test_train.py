"""Messages of a training run: decisions, mistakes at its start, and results."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from btx_jax import progress, stages
from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.checkpoints.checksums import SUMS
from btx_jax.checkpoints.safetensors_files import CHECKSUMS
from btx_jax.commands import convert
from btx_jax.config.config import (
    Config,
    MeshConfig,
    MixConfig,
)
from btx_jax.training.start import PRETRAINED_RATE
from tests.stages.test_evaluate import DENSE

pytestmark = pytest.mark.usefixtures("one_device_only")


@pytest.fixture
def seed(training, run, tmp_path):
    run(training("scratch", 60, DENSE, learning_rate=1e-2), tmp_path / "seed")
    return tmp_path / "seed"


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def heldout(workdir):
    return {
        line["step"]: line["heldout"]["words"]["nats_per_token"]
        for line in metrics(workdir)
        if "heldout" in line
    }


def test_a_run_tells_where_it_began_and_what_it_reached(seed, training, run, tmp_path):
    told = run(training(seed, 10), tmp_path / "expert")
    found = heldout(tmp_path / "expert")
    assert list(found) == [0, 5, 10]
    assert found[0] == pytest.approx(heldout(seed)[60], abs=1e-5), "the seed as it was"
    start, end = f"{found[0]:.3f}", f"{found[10]:.3f}"
    rows = training(seed, 10).train.eval_rows
    assert (
        f"expert: held-out nats per token (train.eval_rows={rows}), start -> end:"
        f" words {start} -> {end}"
    ) in told
    assert f"expert: step 10 is saved in {tmp_path}/expert/checkpoints/10" in told
    assert json.loads((tmp_path / "expert" / "config.json").read_text())["train"][
        "learning_rate"
    ] == pytest.approx(2e-3)


def test_the_start_is_measured_once_however_often_a_run_begins(seed, training, run, tmp_path):
    config = training(seed, 10)
    run(config, tmp_path / "expert")
    (tmp_path / "expert" / "done.json").unlink()
    told = run(config, tmp_path / "expert")
    assert list(heldout(tmp_path / "expert")) == [0, 5, 10]
    assert any("start -> end" in line for line in told), "of a resumed run too"


def test_a_run_without_held_out_losses_tells_its_training_loss(seed, training, run, tmp_path):
    told = run(training(seed, 3, eval_every=0), tmp_path / "expert")
    losses = [line["lm_loss"] for line in metrics(tmp_path / "expert")]
    mean = sum(losses) / 3
    assert f"expert: training loss, first -> last steps: {mean:.3f} -> {mean:.3f}" in told


def test_a_released_model_is_trained_gently_and_everything_after_it(seed, training, run, tmp_path):
    convert.run(str(seed), str(tmp_path / "export"), "")
    shutil.copytree(tmp_path / "export", tmp_path / "released")
    for name in (SUMS, CHECKSUMS):
        (tmp_path / "released" / name).unlink()
    file = tmp_path / "released" / "model.safetensors"
    save_file(load_file(file), file)  # without our history in its header
    told = run(training(tmp_path / "released", 5), tmp_path / "expert")
    assert (
        f"learning rate {PRETRAINED_RATE:g}, chosen for the model that the run starts from" in told
    )
    history = find_checkpoint(tmp_path / "expert").metadata.history
    assert None in history.values() and len(history) == 2
    mix = MixConfig((str(tmp_path / "expert"), str(tmp_path / "released")))
    stages.run(Config("mix", mix=mix, mesh=MeshConfig()), tmp_path / "mix")
    told = run(training(tmp_path / "mix", 2), tmp_path / "finetune")
    assert (
        f"learning rate {PRETRAINED_RATE:g}, chosen for the model that the run starts from" in told
    )


def test_a_start_that_ruins_a_model_is_told_at_once_and_at_the_end(seed, training, run, tmp_path):
    gentle = run(training(seed, 10), tmp_path / "gentle")
    brutal = run(training(seed, 10, learning_rate=1.0), tmp_path / "brutal")
    spoken = [line for line in brutal if "is destroying what these weights have learnt" in line]
    assert not any("undoes" in line for line in gentle)
    assert len(spoken) == 2 and spoken[0] == spoken[1] == brutal[-1]
    assert "brutal: step 4: the held-out loss has risen from" in spoken[0]
    assert (tmp_path / "brutal" / "done.json").exists(), "told, not stopped"
    short = run(training(seed, 2, learning_rate=1.0), tmp_path / "short")
    assert any("step 2: the held-out loss has risen" in line for line in short)


def test_random_weights_never_look_ruined(training, run, tmp_path):
    told = run(training("scratch", 12, DENSE, learning_rate=1e-2), tmp_path / "fresh")
    assert not any("undoes" in line for line in told)


@pytest.mark.parametrize(
    ("dispatch", "factor", "warns"), [("einsum", 0.5, True), ("auto", 0.5, False)]
)
def test_dropped_claims_are_told_with_the_cure(
    seed, training, run, tmp_path, monkeypatch, dispatch, factor, warns
):
    monkeypatch.setattr(progress, "SECONDS", 0)
    mix = MixConfig((str(seed),), copies=4)
    stages.run(Config("mix", mix=mix, mesh=MeshConfig()), tmp_path / "mix")
    config = training(tmp_path / "mix", 4, dispatch=dispatch)
    compute = dataclasses.replace(config.compute, capacity_factor=factor)
    told = run(dataclasses.replace(config, compute=compute), tmp_path / "finetune")
    spoken = [
        line for line in told if "of the routed tokens exceed their expert's capacity" in line
    ]
    assert len(spoken) == (2 if warns else 0), "where it happens, and at the end"
    shares = [
        line["routing"]["dropped"] for line in metrics(tmp_path / "finetune") if "routing" in line
    ]
    assert (min(map(min, shares)) > 0.05) == warns
    shown = [line for line in told if "finetune: step 2 of 4, loss " in line]
    assert len(shown) == 1 and (", dropped 5" in shown[0]) == warns, shown
    named = "einsum" if warns else "ragged"
    assert any(f", {named} dispatch, on " in line for line in told)
    recorded = json.loads((tmp_path / "finetune" / "config.json").read_text())
    assert recorded["compute"]["dispatch"] == named
