import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax.checkpoints.training_state import named_leaves
from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.evaluation.heldout import lower_heldout_step
from btx_jax.models.llama import init_params
from btx_jax.training.optimizer import clip_by_global_norm, decayed, is_trained, schedule
from btx_jax.training.step import (
    Part,
    TrainState,
    TrainStep,
    init_state,
    lower_train_step,
    make_train_step,
)
from tests.models.test_llama import MOE, TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", group_size=8, loss_chunk=64)
TRAIN = TrainConfig(steps=10, batch_size=4, warmup_steps=2, learning_rate=1e-2)


def batch_of(seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (4, 17), 0, 64, jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens).at[1, 5:].set(0)}


def steps(model, train, mesh, n=3, compute=COMPUTE):
    step = make_train_step(model, compute, train, mesh, 16)
    state = init_state(model, train, mesh, jax.random.key(0))
    lines = []
    for i in range(n):
        state, metrics = step(state, batch_of(i), jax.random.key(7))
        lines.append(jax.device_get(metrics))
    return state, lines


def test_float32_is_multiplied_as_float32(one_device):
    """Forward, backward and held out: on a CPU no value tells, a TPU would round every factor."""
    for model in (TINY, MOE):
        programs = [
            part.program for part in lower_train_step(model, COMPUTE, TRAIN, one_device, 16)
        ]
        params = jax.eval_shape(lambda model=model: init_params(model, jax.random.key(0)))
        programs.append(lower_heldout_step(model, COMPUTE, one_device, params, 4, 16))
        for program in programs:
            dots = [
                line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line
            ]
            assert len(dots) > 5
            assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots), (
                "a matmul left to the TPU's default"
            )


def test_schedule_is_the_papers():
    config = TrainConfig(steps=1000, batch_size=1, learning_rate=1e-4, warmup_steps=100)
    rate = schedule(config)
    assert float(rate(0)) == pytest.approx(1e-6)
    assert float(rate(100)) == pytest.approx(1e-4)
    assert float(rate(550)) == pytest.approx(0.55e-4, rel=1e-3)
    assert float(rate(1000)) == pytest.approx(1e-5)


def test_norms_are_not_decayed_and_everything_else_is():
    mask = decayed(init_params(MOE, jax.random.key(0)))
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): v
        for p, v in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert {name for name, value in flat.items() if not value} == {
        "final_norm/scale", "layers_0/attention_norm/scale", "layers_0/ffn_norm/scale",
    }  # fmt: skip


def test_loss_falls_on_a_repeated_batch_and_starts_at_log_v(one_device):
    step = make_train_step(MOE, COMPUTE, TRAIN, one_device, 16)
    state = init_state(MOE, TRAIN, one_device, jax.random.key(0))
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch_of(), jax.random.key(7))
        losses.append(float(metrics.lm_loss))
    assert losses[0] == pytest.approx(np.log(64), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8


def test_metrics_of_every_layer_are_returned(one_device):
    _, lines = steps(MOE, TRAIN, one_device, 1)
    routing = lines[0].routing["layers_0"]
    assert routing.load_E.shape == (3, 4)
    np.testing.assert_allclose(routing.load_E.sum(-1), 1, rtol=1e-6)
    assert lines[0].tokens == 3 * 16 + 4
    assert lines[0].balance_loss == pytest.approx(routing.balance_loss.sum(), rel=1e-6)
    assert lines[0].loss == pytest.approx(lines[0].lm_loss + 0.01 * lines[0].balance_loss, rel=1e-5)


def test_micro_batches_add_up_to_the_big_batch(one_device):
    """Exactly for the LM loss of a dense model, whatever the share of padding in each
    micro-batch."""
    whole, a = steps(TINY, TRAIN, one_device)
    parts, b = steps(TINY, dataclasses.replace(TRAIN, accumulate=2), one_device)
    for x, y in zip(a, b, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-5)
        assert x.grad_norm == pytest.approx(y.grad_norm, rel=1e-4)
    for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_balance_weight_moves_the_router_and_zero_does_not(one_device):
    _, with_balance = steps(MOE, dataclasses.replace(TRAIN, balance_weight=1.0), one_device, 1)
    _, without = steps(MOE, dataclasses.replace(TRAIN, balance_weight=0.0), one_device, 1)
    assert without[0].loss == pytest.approx(without[0].lm_loss, rel=1e-6)
    assert with_balance[0].grad_norm != without[0].grad_norm


def test_clipping_is_optaxs_up_to_rounding():
    updates = {"a": jnp.array([3.0, -4.0]), "b": jnp.ones((2, 2)) * 6}
    for norm in (1.0, 13.0, 1000.0):
        expected, _ = optax.clip_by_global_norm(norm).update(updates, optax.EmptyState())
        chex.assert_trees_all_close(
            clip_by_global_norm(norm).update(updates, optax.EmptyState())[0], expected, rtol=1e-6
        )
    zeros = jax.tree.map(jnp.zeros_like, updates)
    chex.assert_trees_all_equal(
        clip_by_global_norm(1.0).update(zeros, optax.EmptyState())[0], zeros
    )


def test_a_first_moment_in_bfloat16_is_half_the_size_and_trains_as_well(one_device):
    less = dataclasses.replace(TRAIN, first_moment_dtype="bfloat16")
    for count, tolerance in ((1, 0), (3, 1e-3)):  # the first update is made before it is rounded
        want, lines = steps(TINY, TRAIN, one_device, count)
        got, others = steps(TINY, less, one_device, count)
        chex.assert_trees_all_close(got.params, want.params, rtol=0, atol=tolerance)
    losses = ([float(line.loss) for line in run] for run in (others, lines))
    np.testing.assert_allclose(*losses, rtol=1e-3)
    moments = optax.tree_utils.tree_get(got.opt_state, "mu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
    seconds = optax.tree_utils.tree_get(got.opt_state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(seconds)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("frozen", ["experts", "all_but_routers", "shared"])
def test_what_is_frozen_keeps_its_bits_and_has_no_moments(frozen, one_device):
    train = dataclasses.replace(TRAIN, frozen=frozen)
    before = jax.device_get(init_state(MOE, train, one_device, jax.random.key(0)).params)
    state, lines = steps(MOE, train, one_device)
    after = named_leaves(jax.device_get(state.params))
    trained = {name: is_trained(tuple(name.split("/")), frozen) for name in after}
    for name, was in named_leaves(before).items():
        assert trained[name] == (
            "router" in name
            or (frozen == "experts" and "/ffn/" not in name)
            or (frozen == "shared" and "/ffn/" in name)
        )
        assert np.array_equal(after[name], was) != trained[name], name
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for name, x in named_leaves(before).items() if trained[name])
    _, free = steps(MOE, TRAIN, one_device, 1)
    assert lines[0].lm_loss == free[0].lm_loss, "the forward pass is the same"
    assert lines[0].grad_norm < free[0].grad_norm


def test_a_branchs_step_holds_no_gradients_and_no_moments_of_what_is_shared(one_device):
    def needs(frozen):
        train = dataclasses.replace(TRAIN, frozen=frozen)
        (part,) = make_train_step(TINY, COMPUTE, train, one_device, 16).parts
        memory = part.program.memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    (held, temporary), (free_held, free_temporary) = needs("shared"), needs("")
    shared = sum(
        leaf.nbytes
        for name, leaf in named_leaves(init_params(TINY, jax.random.key(0))).items()
        if "/ffn/" not in name
    )
    assert free_held - held == 2 * shared
    assert free_temporary - temporary > shared / 2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_dropped_step_leaves_the_state_whole(accumulate, one_device):
    """Wherever it is dropped, and none the wiser when it is done again."""
    train = dataclasses.replace(TRAIN, accumulate=accumulate)
    step = make_train_step(MOE, COMPUTE, train, one_device, 16)
    key = jax.random.key(7)

    def started():
        return init_state(MOE, train, one_device, jax.random.key(0))

    want, _ = step(started(), batch_of(), key)
    state = started()
    places = accumulate + 1 if accumulate > 1 else 1
    for place in range(places):
        answers = iter([None] * place)
        with pytest.raises(StopIteration):
            step(state, batch_of(), key, lambda answers=answers: next(answers))
    got, _ = step(state, batch_of(), key)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))


def test_no_more_than_two_micro_batches_are_under_way(monkeypatch):
    """One where they are long: what a signal waits for."""
    order = []
    monkeypatch.setattr(jax, "block_until_ready", order.append)
    add = Part(lambda sums, params, step, batch, index, key: (sums, f"loss {index}"), times=3)
    step = TrainStep([Part(lambda batch: 0), add, Part(lambda state, sums: (state, order))])
    state = TrainState("the step before", {}, {})
    step(state, {}, None, lambda: order.append("asked"))
    assert order == ["asked", "the step before", "asked", "loss 0", "asked", "loss 1", "asked"]
    monkeypatch.setattr(TrainStep, "LONG", -1.0)
    order.clear()
    step(state, {}, None)
    assert order == ["loss 0", "loss 1", "loss 2"]
