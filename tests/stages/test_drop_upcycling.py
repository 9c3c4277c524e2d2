"""The mix stage with copies whose hidden units are reinitialised."""

import dataclasses

import jax
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.config.config import CheckpointConfig, Config, MeshConfig, MixConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.models.llama import init_params
from tests.models import test_llama

MODEL = dataclasses.replace(test_llama.TINY, vocab_size=320)


@pytest.fixture
def seed(tmp_path, tokenizer_file):
    checkpoints = Checkpoints(tmp_path / "seed", CheckpointConfig())
    checkpoints.save(CheckpointMetadata(MODEL, 1, {}), init_params(MODEL, jax.random.key(0)))
    checkpoints.close()
    copy_tokenizer(load_tokenizer(tokenizer_file), tmp_path / "seed" / "tokenizer")
    return tmp_path / "seed"


def mixed(seed, name, rng_seed=0, **mix):
    given = MixConfig((str(seed),), copies=3, **mix)
    config = Config("mix", mix=given, mesh=MeshConfig(), rng_seed=rng_seed)
    stages.run(config, seed.parent / name)
    return load_params(find_checkpoint(seed.parent / name))


def test_a_share_of_each_copy_is_drawn_anew_the_same_for_a_seed(seed):
    copies = mixed(seed, "copies")
    drawn = mixed(seed, "drawn", reinit=0.5)
    again = mixed(seed, "again", reinit=0.5)
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    other = mixed(seed, "other", 1, reinit=0.5)
    before, after, others = (tree["layers_0"].pop("ffn") for tree in (copies, drawn, other))
    jax.tree.map(np.testing.assert_array_equal, copies, drawn)
    np.testing.assert_array_equal(before["router"], after["router"])
    for name in ("gate", "up", "down"):
        moved = np.asarray(before[name] != after[name])
        assert moved.mean((-2, -1)) == pytest.approx(0.5), name
        assert (moved != np.asarray(before[name] != others[name])).any(), name


def test_routers_start_uniform(seed):
    router = mixed(seed, "uniform", router="uniform", router_std=0.1)["layers_0"]["ffn"]["router"]
    assert 0.9 * 0.1 * 3**0.5 < np.abs(router).max() <= 0.1 * 3**0.5 * (1 + 1e-6)
