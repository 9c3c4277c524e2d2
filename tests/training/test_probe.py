"""The mixing probe: the average with the seed, and the barrier."""

import dataclasses

import jax
import numpy as np
import pytest

from btx_jax.config.config import TrainConfig
from btx_jax.config.model_config import LoRAConfig
from btx_jax.models.leaves import computes_in_float32, is_feed_forward
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training import probe
from btx_jax.training.step import state_shardings
from tests.models.test_llama import TINY

TRAIN = TrainConfig(10, 8, warmup_steps=1, eval_every=5, mixing_probe=True)


def heldout(**losses):
    return {name: {"nats_per_token": x, "bits_per_byte": 9.0} for name, x in losses.items()}


def test_the_barrier_is_measured_from_the_better_of_seed_and_branch_on_each_domain():
    seed, branch = heldout(math=2.0, prose=3.0), heldout(math=1.0, prose=3.6)
    assert probe.barrier(seed, branch, heldout(math=1.0, prose=3.0)) == pytest.approx(0)
    assert probe.barrier(seed, branch, heldout(math=1.5, prose=3.3)) == pytest.approx(0.4)
    assert probe.barrier(seed, branch, heldout(math=0.9, prose=2.9)) == pytest.approx(-0.1)
    assert probe.barrier(seed, branch, branch) == pytest.approx(0.3), "what it forgot"
    assert probe.barrier(seed, seed, seed) == 0


def test_it_is_probed_where_something_shared_moves():
    assert probe.is_probed(TINY, TRAIN)
    for change in ({"frozen": "shared"}, {"eval_every": 0}, {"mixing_probe": False}):
        assert not probe.is_probed(TINY, dataclasses.replace(TRAIN, **change)), change
    adapted = dataclasses.replace(TINY, lora=LoRAConfig("2"))
    assert not probe.is_probed(adapted, dataclasses.replace(TRAIN, frozen="base"))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 2)], ids=["one", "eight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_numpys_and_lies_as_the_branch_does(shape, dtype, monkeypatch):
    mesh = make_mesh(shape, jax.devices()[: np.prod(shape)])
    train = dataclasses.replace(TRAIN, frozen_dtype=dtype)
    abstract = state_shardings(TINY, train, mesh)[0].params
    rng = np.random.default_rng(0)

    def drawn(leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    branch = jax.tree.map(drawn, abstract)
    held = probe.abstract_seed(abstract, train)
    seed = jax.tree.map(drawn, held)
    monkeypatch.setattr(probe, "load_part", lambda init, wanted: seed)
    mixed = probe.make_average(None, abstract, train)(branch)
    assert jax.tree.structure(mixed) == jax.tree.structure(branch)
    others = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(seed)
    }
    for (path, got), own in zip(
        jax.tree_util.tree_leaves_with_path(mixed), jax.tree.leaves(branch), strict=True
    ):
        assert (got.dtype, got.sharding) == (own.dtype, own.sharding), path
        name = jax.tree_util.keystr(path)
        assert (name in others) == (not is_feed_forward(path))
        want = np.asarray(own)
        if name in others:
            small = computes_in_float32(path)
            assert others[name].dtype == ("float32" if small else dtype)
            want = (want + np.asarray(others[name]).astype(np.float32)) / 2
        assert np.array_equal(np.asarray(got), want), path
