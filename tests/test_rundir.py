import dataclasses
import errno
import os
from pathlib import Path

import pytest

from btx_jax import stages
from btx_jax.config.config import Config, MeshConfig
from btx_jax.config.config_dict import to_dict
from btx_jax.errors import UserError
from btx_jax.output import locked
from btx_jax.presets import recipes
from btx_jax.presets.recipes import expert
from btx_jax.rundir import (
    claim,
    done_of,
    finish,
    has_begun,
    has_finished,
    held,
    recorded_config,
    recorded_results,
)
from btx_jax.training.start import settled


@pytest.mark.parametrize("result", ["metrics.jsonl", "expert_math/checkpoints/10/about/metadata"])
def test_a_directory_is_a_configs_own_once_it_holds_more_than_that(tmp_path, result):
    config: Config = expert("math", "tiny")
    other = dataclasses.replace(config, rng_seed=1)
    claim(tmp_path, config)
    for file in ("tokenizer/tokenizer.model", "expert_math/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    claim(tmp_path, other)  # the earlier run left no results
    (tmp_path / result).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / result).write_text("")
    claim(tmp_path, other)
    with pytest.raises(
        UserError,
        match="a different config: rng_seed: 1 -> 0; choose another --workdir or undo the change",
    ):
        claim(tmp_path, config)
    less = dataclasses.replace(other, compute=dataclasses.replace(other.compute, remat="attention"))
    claim(tmp_path, less)  # uses other memory, computes the same


def test_what_a_config_leaves_open_is_no_other_config_once_it_is_decided(tmp_path):
    config: Config = expert("math", "tiny")
    assert config.compute
    assert config.train
    open_ = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, dispatch="auto"),
        train=dataclasses.replace(config.train, learning_rate=0.0),
    )
    decided = settled(
        dataclasses.replace(open_, init=""), {"init": "", "train": {"learning_rate": 1e-3}}
    )
    assert decided.compute
    assert decided.compute.dispatch in ("einsum", "ragged")
    claim(tmp_path, dataclasses.replace(decided, init=open_.init))
    (tmp_path / "metrics.jsonl").touch()
    assert done_of(tmp_path, open_) is None, "as a pipeline looks before it starts"
    for change in (
        {"compute": dataclasses.replace(config.compute, dispatch="einsum")},
        {"train": dataclasses.replace(config.train, learning_rate=1.0)},
    ):
        with pytest.raises(UserError, match="a different config"):
            done_of(tmp_path, dataclasses.replace(open_, **change))


def test_a_pipeline_s_runs_may_go_on_on_another_mesh(tmp_path):
    config = recipes.demo()
    claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    name = next(name for name, stage in config.pipeline.items() if stage.config.mesh)
    stage = config.pipeline[name]
    moved = dataclasses.replace(
        stage, config=dataclasses.replace(stage.config, mesh=MeshConfig(data=2))
    )
    claim(tmp_path, dataclasses.replace(config, pipeline={**config.pipeline, name: moved}))


def test_a_directory_is_one_process_s_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is using it"):
        stages.run(expert("math", "tiny"), tmp_path)


def test_a_directory_is_held_by_a_block_that_leaves_nothing_behind_when_it_fails(tmp_path):
    place = tmp_path / "runs" / "mine"
    with pytest.raises(UserError, match="another process is using it"), held(place), held(place):
        pass
    assert not (tmp_path / "runs").exists()


def test_where_directories_cannot_be_renamed_no_run_begins(tmp_path, monkeypatch):
    """As on a mounted bucket without a hierarchical namespace."""

    def rename(self, target):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(Path, "rename", rename)
    told = r"--workdir: .* does not support renaming directories \(Operation not supported\); mount"
    with pytest.raises(UserError, match=told):
        claim(tmp_path, expert("math", "tiny"))
    assert not list(tmp_path.iterdir())


def test_what_a_directory_tells_of_its_run(tmp_path):
    config = expert("math", "tiny")
    assert (recorded_config(tmp_path), recorded_results(tmp_path)) == ({}, None)
    claim(tmp_path, config)
    assert has_begun(tmp_path) and not has_finished(tmp_path)
    assert recorded_config(tmp_path) == to_dict(config)
    finish(tmp_path, seconds=1.0)
    assert has_finished(tmp_path) and recorded_results(tmp_path) == {"seconds": 1.0}


def test_a_run_on_s3_is_refused():
    class OnS3:
        def __str__(self):
            return "s3://bucket/run"

    with pytest.raises(UserError, match="use a disk or gs://"), held(OnS3()):
        pass
