import asyncio
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.checkpoints.checksums import SEAL, sealed
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints, TrainingRun
from btx_jax.config.config import CheckpointConfig, TrainConfig
from btx_jax.errors import UserError
from btx_jax.models.llama import init_params
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import init_state, state_shardings
from tests.models.test_llama import MOE, TINY

TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=1)


RUN = TrainingRun(5, 30.0, seconds=2.0, chips=1, peak_bytes=7)


def save(workdir, params, model=TINY, step=3):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(CheckpointMetadata(model, step, {"a": RUN}), params)
    checkpoints.close()


def test_state_comes_back_onto_another_mesh(tmp_path):
    saved = init_state(MOE, TRAIN, make_mesh((1, 2, 4, 1)), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    for step in (2, 4):
        checkpoints.save(
            CheckpointMetadata(MOE, step, {}), saved.params, saved.opt_state, {"next_index": step}
        )
    checkpoints.close()
    for shape, devices in (((1, 1, 1, 1), 1), ((1, 2, 1, 1), 2), ((2, 2, 2, 1), 8)):
        abstract, _ = state_shardings(MOE, TRAIN, make_mesh(shape, jax.devices()[:devices]))
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
        assert checkpoints.latest_step() == 4
        params, opt_state, data = checkpoints.restore(4, abstract.params, abstract.opt_state)
        checkpoints.close()
        assert data == {"next_index": 4}
        for a, b in zip(
            jax.tree.leaves((params, opt_state)),
            jax.tree.leaves((saved.params, saved.opt_state)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        gate = params["layers_0"]["ffn"]["gate"]
        assert len(gate.sharding.device_set) == devices
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "4"
    ], "keep=1"


def test_a_checkpoint_describes_itself(tmp_path):
    params = init_params(MOE, jax.random.key(0))
    save(tmp_path, params, MOE)
    found = find_checkpoint(tmp_path)
    assert found.metadata.model == MOE
    assert found.metadata.step == 3
    assert found.metadata.costs()["tokens"] == 5
    assert digest(load_params(found)) == digest(params)
    assert find_checkpoint(tmp_path / "checkpoints" / "3").metadata == found.metadata


def test_digest_sees_every_bit_name_dtype_and_shape():
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}
    want = digest(params)
    assert digest({"b": params["b"], "a": params["a"]}) == want, (
        "the order of insertion does not matter"
    )
    for other in (
        {**params, "a": params["a"].at[0].set(np.nextafter(np.float32(0), np.float32(1)))},
        {**params, "b": params["b"].reshape(4)},
        {**params, "b": params["b"].astype(jnp.bfloat16)},
        {"a": params["a"], "c": params["b"]},
    ):
        assert digest(other) != want


def test_a_mistyped_leaf_raises_and_all_problems_are_told_at_once(tmp_path):
    params = dict(init_params(TINY, jax.random.key(0)))
    params["final_nrom"] = params.pop("final_norm")
    params["embed"] = {"embedding": params["embed"]["embedding"][:-1]}
    save(tmp_path, params)
    with pytest.raises(UserError) as error:
        load_params(find_checkpoint(tmp_path))
    for problem in (
        "missing final_norm/scale",
        "unknown final_nrom/scale",
        "embed/embedding is (63, 32), not (64, 32)",
    ):
        assert problem in str(error.value)


def test_a_stored_nan_is_refused(tmp_path):
    params = init_params(TINY, jax.random.key(0))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[1].set(jnp.nan)
    save(tmp_path, params)
    with pytest.raises(UserError, match="NaN or infinity in final_norm/scale"):
        load_params(find_checkpoint(tmp_path))


def test_a_directory_of_checkpoints_names_those_that_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = init_params(TINY, jax.random.key(0))
    run = tmp_path / "runs/mine"
    for stage in ("prepare", "expert_a", "finetune", "export"):
        (run / stage).mkdir(parents=True)
        (run / stage / "config.json").write_text('{"stage": "train"}')
    (run / "config.json").write_text('{"stage": "pipeline", "pipeline": {}}')
    save(run / "expert_a", params)
    save(run / "finetune", params)
    (run / "export/model").mkdir()
    (run / "export/model/config.json").write_text('{"model_type": "llama"}')
    for named, listed in (
        ("runs/mine", "runs/mine/expert_a, runs/mine/export/model, runs/mine/finetune"),
        ("runs/mine/export/", "runs/mine/export/model"),
    ):
        with pytest.raises(UserError) as error:
            find_checkpoint(named, "--model")
        path = tmp_path / named
        assert (
            str(error.value)
            == f"--model: {path} is not a checkpoint but contains some; name one: {listed}"
        )
    assert find_checkpoint("runs/mine/finetune")


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"config\.init: .* does not exist"):
        find_checkpoint(tmp_path / "nothing", "config.init")
    with pytest.raises(UserError, match="is not a checkpoint; name a run's --workdir"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        find_checkpoint(tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "config.json").write_text('{"stage": "pipeline", "pipeline": {}}')
    with pytest.raises(UserError, match="pipeline is a run that has not saved a checkpoint yet"):
        find_checkpoint(tmp_path / "pipeline")
    with pytest.raises(
        UserError,
        match=r"config\.init='\$NOT_SET/seed': the environment variable NOT_SET is not set",
    ):
        find_checkpoint("$NOT_SET/seed", "config.init")
    with pytest.raises(
        UserError,
        match=r"config\.init='ftp://b/seed': not a path, gs:// or s3://; check the spelling",
    ):
        find_checkpoint("ftp://b/seed", "config.init")
    with pytest.raises(
        UserError, match=r"mistralai/Nothing-7B does not exist here .* HF_HUB_OFFLINE"
    ):
        find_checkpoint("mistralai/Nothing-7B", "base_model")
    save(tmp_path, init_params(TINY, jax.random.key(0)))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        metadata = checkpointer.restore(tmp_path / "checkpoints" / "3" / "about")
    del metadata[SEAL]
    metadata = sealed({**metadata, "format": 99})
    (tmp_path / "checkpoints" / "3" / "about" / "metadata").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="checkpoint format 99; this version reads 2 and 3"):
        find_checkpoint(tmp_path)


def test_costs_add_up_and_branches_wait_for_their_seed_only():
    def run(tokens, seconds, *after, chips=1):
        return TrainingRun(tokens, 10.0 * tokens, seconds, chips, tokens, after)

    seed = {"s": run(100, 10.0)}
    branches = {"a": run(10, 3.0, "s", chips=4), "b": run(20, 5.0, "s")}
    metadata = CheckpointMetadata(TINY, 7, {**seed, **branches, "f": run(30, 2.0, "s", "a", "b")})
    assert metadata.costs() == {
        "tokens": 160,
        "flops": 1600.0,
        "chip_seconds": 29.0,
        "critical_seconds": 17.0,
        "peak_bytes": 100,
        "unknown": [],
    }
    assert metadata.costs(without=seed) == {
        "tokens": 60,
        "flops": 600.0,
        "chip_seconds": 19.0,
        "critical_seconds": 7.0,
        "peak_bytes": 30,
        "unknown": [],
    }
    assert CheckpointMetadata(TINY, 0, {}).costs()["critical_seconds"] == 0
    bought = {"SmolLM2 (0)": None, "m": run(5, 1.0, "SmolLM2 (0)")}
    costs = CheckpointMetadata(TINY, 0, bought).costs()
    assert (costs["tokens"], costs["critical_seconds"]) == (5, 1.0)
    assert costs["unknown"] == ["SmolLM2 (0)"]
    assert CheckpointMetadata(TINY, 0, bought).costs(without={"SmolLM2 (0)": None})["unknown"] == []


def test_reads_and_writes_that_fail_beside_another_are_not_told_again(tmp_path, caplog):
    """As asyncio does for a task whose result nobody awaits; errors of other tasks are logged."""
    Checkpoints(tmp_path, CheckpointConfig()).close()
    code = "async def fail(words):\n  raise ValueError(words)"
    failing = {}
    for library in ("orbax", "else"):
        exec(compile(code, f"/site-packages/{library}/x.py", "exec"), names := {})
        failing[library] = names["fail"]

    async def both():
        await asyncio.wait([asyncio.create_task(fail(name)) for name, fail in failing.items()])

    asyncio.run(both())
    gc.collect()
    told = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert len(told) == 1 and "else" in told[0]
