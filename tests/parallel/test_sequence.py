"""Rows cut over the context axis against rows on one device."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LoRAConfig, MoEConfig, RopeScaling
from btx_jax.evaluation.heldout import make_heldout_step
from btx_jax.models.attention import attend
from btx_jax.models.splash import splash_attend
from btx_jax.parallel.sequence import TOKENS, exchanged, groups, order, part, ungrouped, whole
from btx_jax.parallel.sharding import batch_sharding, make_mesh, shard_map
from btx_jax.training.step import init_state, make_train_step
from tests.models.test_llama import TINY

TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-2)
COMPUTE = ComputeConfig(dispatch="ragged", dtype="float32", loss_chunk=16, group_size=8)
LENGTH = 128
MIXTURE = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4)))
SAMPLED = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4), routing="sample_top1"))
ADAPTED = dataclasses.replace(TINY, lora=LoRAConfig("2,3,4", dropout=0.3))
# Positions count from the start of a document, and frequencies depend on its length.
LOCAL = dataclasses.replace(
    TINY,
    window=24,
    attention_cap=5.0,
    rope_scaling=RopeScaling("dynamic", 2.0, original_context=16, query_growth=0.5),
)
EINSUM = dataclasses.replace(COMPUTE, dispatch="einsum", capacity_factor=1.0)


def rows(length=LENGTH):
    """Documents of many lengths, that end within and at the ends of pieces; padding; what is read
    and not learnt."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, TINY.vocab_size, (8, length + 1), np.int32)
    segments = 1 + (random.random((8, length + 1)) < 0.05).cumsum(1).astype(np.int32)
    segments[1], segments[2, length // 2 :], segments[3, 20:] = 1, 2, 0
    segments[4, 10:30] *= -1
    return {"tokens": tokens, "segments": segments}


def results(model, compute, train, mesh):
    """Losses, statistics, moments (a sum of gradients) and held-out losses of two steps."""
    step = make_train_step(model, compute, train, mesh, LENGTH)
    state = init_state(model, train, mesh, jax.random.key(0))
    batch = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in rows().items()}
    metrics = []
    for _ in range(2):
        state, told = step(state, batch, jax.random.key(1))
        metrics.append(told)
    heldout = make_heldout_step(model, compute, mesh)(state.params, *batch.values())
    return jax.device_get((metrics, state.opt_state, heldout))


def require_equal(found, expected):
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("model", "compute", "shapes"),
    [
        (TINY, COMPUTE, [(1, 1, 1, 2, 4), (1, 1, 1, 1, 8)]),
        pytest.param(MIXTURE, COMPUTE, [(1, 1, 2, 1, 4)], marks=pytest.mark.slow),
        pytest.param(MIXTURE, EINSUM, [(2, 1, 1, 1, 4)], marks=pytest.mark.slow),
        pytest.param(LOCAL, COMPUTE, [(1, 2, 1, 1, 4)], marks=pytest.mark.slow),
        pytest.param(SAMPLED, COMPUTE, [(1, 2, 1, 1, 4)], marks=pytest.mark.slow),
        pytest.param(ADAPTED, COMPUTE, [(1, 2, 1, 2, 2)], marks=pytest.mark.slow),
    ],
    ids=["dense", "ragged", "einsum", "local", "sampled", "lora"],
)
def test_cut_rows_give_the_losses_and_gradients_of_one_device(model, compute, shapes, one_device):
    train = dataclasses.replace(TRAIN, frozen="base") if model.lora else TRAIN
    expected = results(model, compute, train, one_device)
    for shape in shapes:
        require_equal(results(model, compute, train, make_mesh(shape)), expected)


def on_parts(function, count, *arrays):
    """function, run by `count` devices, of arrays [B, T, ...] that are cut between them."""
    with jax.set_mesh(make_mesh((1, 1, 1, 1, count), jax.devices()[:count])):
        held = [exchanged(jnp.asarray(x)) for x in arrays]
        y = jax.jit(shard_map(function, (TOKENS,) * len(held), TOKENS))(*held)
        return np.asarray(exchanged(y))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_device_holds_a_late_piece_for_an_early_one(count):
    length = 4 * count
    x = np.arange(2 * length * 3).reshape(2, length, 3)
    with jax.set_mesh(make_mesh((1, 1, 1, 1, count), jax.devices()[:count])):
        held = exchanged(jnp.asarray(x))
        np.testing.assert_array_equal(held, x[:, order(length, count)])
        np.testing.assert_array_equal(exchanged(held), x)
        rows = groups(held, 2)
        np.testing.assert_array_equal(ungrouped(rows, 2), held)
    assert {row.tobytes() for row in np.asarray(rows)} == {
        row.tobytes() for row in x.astype(rows.dtype).reshape(-1, 2, 3)
    }, "groups are not those of the text"
    places = order(length, count).reshape(count, -1)
    assert len(set(places.sum(1))) == 1, "some devices see more keys than others"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_gathered_row_is_in_the_order_of_the_text(count):
    x = np.random.default_rng(0).normal(size=(2, 4 * count, 3)).astype(np.float32)

    def sums(x_BT):  # of all tokens up to one's own
        row = whole(x_BT, axis=1)
        return part(jnp.cumsum(row, axis=1), axis=1)

    np.testing.assert_allclose(on_parts(sums, count, x), x.cumsum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (150, 2.0)], ids=["causal", "window"])
def test_splash_on_parts_of_rows_equals_attention_on_one_device(window, cap):
    length = 512
    shapes = [(2, length, 2, 2, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 2, 2, 8)]
    *qkv, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    segments = np.repeat([[1, 1, 1, 2], [1, 2, 0, 0]], length // 4, axis=1).astype(np.int32)

    def heads_first(x):
        return jnp.moveaxis(x, 1, -2)

    def attention(attend, q, k, v, segments, dy):
        """[B, T, ...]: the answers and the three gradients."""

        def answers(q, k, v):
            row = (whole(heads_first(x), axis=2) for x in (k, v))
            return jnp.moveaxis(attend(heads_first(q), *row, whole(segments, axis=1)), -2, 1)

        y, pull = jax.vjp(answers, q, k, v)
        return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (y, *pull(dy))], axis=-1)

    kernel = lambda *a: splash_attend(*a, window, True, 0.0, cap)  # noqa: E731
    plain = lambda *a: attend(*a, window, 0.0, cap)  # noqa: E731
    arrays = (*qkv, segments, dy)
    expected = jax.jit(partial(attention, plain))(*arrays)
    seen = np.asarray(segments > 0)
    for found in (on_parts(partial(attention, f), 2, *arrays) for f in (kernel, plain)):
        np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
