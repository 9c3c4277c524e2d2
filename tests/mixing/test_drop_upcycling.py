import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import MixConfig
from btx_jax.errors import ConfigError
from btx_jax.mixing.drop_upcycling import redrawn
from btx_jax.mixing.mix import upcycle_params
from btx_jax.mixing.router import normal_routers, uniform_routers
from btx_jax.models.llama import init_params
from tests.models.test_llama import TINY

COPIES, SHARE = 4, 0.25
OF_UNITS = {"gate": -2, "up": -2, "down": -1}  # the axis that is not d_ff


@pytest.fixture(scope="module")
def mixture():
    """Copies of a model whose matrices have distinct means and standard deviations."""
    seed = init_params(TINY, jax.random.key(0))
    ffn = {
        name: leaf * scale + jnp.arange(leaf.shape[0])[:, None, None]
        for (name, leaf), scale in zip(seed["layers_0"]["ffn"].items(), (1, 3, 9), strict=True)
    }
    seed["layers_0"] = {**seed["layers_0"], "ffn": ffn}
    routers = normal_routers(jax.random.key(1), [("layers_0", TINY.layers, COPIES)], TINY.d_model)
    return upcycle_params(seed, COPIES, routers)


def changed_units(before, after):
    """name -> [layers, experts, d_ff]: whether any, and whether all, of a unit's values changed."""
    moved = {name: np.asarray(before[name] != after[name]) for name in OF_UNITS}
    return (
        {name: moved[name].any(axis) for name, axis in OF_UNITS.items()},
        {name: moved[name].all(axis) for name, axis in OF_UNITS.items()},
    )


def test_the_same_units_are_drawn_anew_in_gate_up_and_down_and_all_else_keeps_its_bits(mixture):
    made = redrawn(mixture, jax.random.key(2), SHARE)
    some, every = changed_units(mixture["layers_0"]["ffn"], made["layers_0"]["ffn"])
    assert (some["gate"].sum(-1) == round(SHARE * TINY.d_ff)).all()
    for name in OF_UNITS:
        np.testing.assert_array_equal(some[name], some["gate"], err_msg=name)
        np.testing.assert_array_equal(every[name], some["gate"], err_msg=f"{name}: whole units")
    chosen = some["gate"].reshape(-1, TINY.d_ff)
    assert len(np.unique(chosen, axis=0)) == len(chosen), "each expert of each layer has its own"
    jax.tree_util.tree_map_with_path(
        lambda path, before, after: (
            None
            if path[-1].key in OF_UNITS
            else np.testing.assert_array_equal(before, after, err_msg=str(path))
        ),
        mixture,
        made,
    )


def test_what_is_drawn_has_mean_and_deviation_of_what_it_replaces(mixture):
    before = mixture["layers_0"]["ffn"]
    after = redrawn(mixture, jax.random.key(2), SHARE)["layers_0"]["ffn"]
    for name in OF_UNITS:
        old, new = (np.asarray(ffn[name], np.float64) for ffn in (before, after))
        moved = old != new
        for layer, expert in np.ndindex(moved.shape[:2]):
            mask = moved[layer, expert]
            was, now = old[layer, expert][mask], new[layer, expert][mask]
            error = was.std() / mask.sum() ** 0.5
            assert abs(now.mean() - was.mean()) < 5 * error, (name, layer, expert)
            assert abs(now.std() / was.std() - 1) < 5 / mask.sum() ** 0.5, (name, layer, expert)


def test_a_key_gives_the_same_numbers_and_another_key_others(mixture):
    def up(make, seed):
        return np.asarray(make(mixture, jax.random.key(seed), SHARE)["layers_0"]["ffn"]["up"])

    first = up(redrawn, 2)
    np.testing.assert_array_equal(first, up(redrawn, 2))
    jitted = up(jax.jit(redrawn, static_argnums=2), 2)
    np.testing.assert_allclose(first, jitted, rtol=0, atol=1e-6 * np.abs(first).max())
    assert (first != up(redrawn, 3)).mean() > SHARE


def test_dense_runs_stay_and_dtypes_too(mixture):
    dense = init_params(TINY, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, dense, redrawn(dense, jax.random.key(2), SHARE))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mixture)
    made = redrawn(half, jax.random.key(2), SHARE)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}


def test_uniform_routers_have_the_named_deviation():
    made = uniform_routers(jax.random.key(0), [("layers_0", 8, 4), ("layers_1", 2, 4)], 256)
    rows = np.concatenate([np.ravel(leaf) for leaf in made.values()])
    assert rows.std() == pytest.approx(0.02, rel=0.02)
    assert 0.999 * 0.02 * 3**0.5 < np.abs(rows).max() <= 0.02 * 3**0.5 * (1 + 1e-6)
    assert abs(rows.mean()) < 1e-3
    assert not (made["layers_0"][0] == made["layers_1"][0]).any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"copies": 1},
            "method='btx' with copies=1 makes none; set method='btx' and copies=2 or more",
        ),
        ({"method": "average"}, "method='average' with copies=2 makes none"),
        ({"method": "split", "chunks": 2}, "method='split' with copies=2 makes none"),
        ({"reinit": 1.5}, "reinit=1.5: must lie in"),
    ],
)
def test_reinit_is_of_copies(changes, told):
    right = MixConfig(("seed",), copies=2, reinit=0.5)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(right, **changes)
    assert told in str(caught.value)
