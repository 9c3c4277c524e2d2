import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.checkpoints.training_state import named_leaves
from btx_jax.config.config import TrainConfig
from btx_jax.config.model_config import LoRAConfig, LoRASpec, MoEConfig
from btx_jax.errors import ConfigError
from btx_jax.mixing.mix import restack
from btx_jax.models.llama import Llama, init_params, logits, parameter_counts
from btx_jax.models.lora import PLACES, adapt, gates, is_adapter, partition, router_statistics
from btx_jax.parallel.sharding import batch_sharding, make_mesh
from btx_jax.presets.recipes import LLAMA2_7B
from btx_jax.training.step import init_state, make_train_step, state_shardings
from tests import reference
from tests.models.test_llama import FP32, MOE, TINY, forward, tokens_of
from tests.training.test_step import COMPUTE, batch_of

MOLA = dataclasses.replace(TINY, lora=LoRAConfig("2,3,3", rank=(4,), targets=("q", "o", "down")))
EVERYWHERE = dataclasses.replace(TINY, lora=LoRAConfig("3", rank=(4,)))
PLAIN = dataclasses.replace(TINY, lora=LoRAConfig("1", rank=(4,), k=(1,)))
LORA_TRAIN = TrainConfig(
    steps=10, batch_size=4, warmup_steps=2, learning_rate=1e-2, frozen="base", balance_weight=0.1
)


@functools.cache
def busy(model, seed=1):
    """Parameters with nonzero B."""
    params = init_params(model, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def noise(path, x):
        return x + 0.1 * jax.random.normal(next(keys), x.shape) if path[-1].key == "b" else x

    return jax.device_get(
        jax.tree_util.tree_map_with_path(noise, params)
    )  # a step donates device arrays


@functools.cache
def program(model):
    def run(params, tokens, segments, rngs):
        return logits(
            params, Llama(model, FP32).apply({"params": params}, tokens, segments, rngs=rngs)[0]
        )

    return jax.jit(run)


def logits_of(model, params, tokens, segments=None, **rngs):
    return program(model)(
        params, tokens, jnp.ones_like(tokens) if segments is None else segments, rngs
    )


@pytest.mark.parametrize(
    ("allocation", "count"),
    [("5555", 105_635_840), ("2468", 105_635_840), ("8642", 105_635_840), ("8228", 105_635_840), ("2882", 105_635_840)]
    + [("8888", 169_017_344), ("4444", 84_508_672), ("6622", 84_508_672)],
)  # fmt: skip
def test_the_papers_parameter_counts(allocation, count, one_device):
    """For Llama-2-7B; another number means a superfluous parameter, a bias, or a shared router."""
    model = dataclasses.replace(LLAMA2_7B, lora=LoRAConfig(allocation))
    assert parameter_counts(model)[0] - parameter_counts(LLAMA2_7B)[0] == count
    state, _ = state_shardings(model, LORA_TRAIN, one_device)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * count, (
        "two moments of the experts, and of nothing else"
    )


def test_plain_lora_s_count(one_device):
    model = dataclasses.replace(LLAMA2_7B, lora=LoRAConfig("1", rank=(64,), k=(1,)))
    assert parameter_counts(model)[0] - parameter_counts(LLAMA2_7B)[0] == 159_907_840
    state, _ = state_shardings(model, LORA_TRAIN, one_device)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * 159_907_840


@pytest.mark.parametrize("model", [EVERYWHERE, PLAIN], ids=["mola", "plain"])
def test_at_initialisation_it_is_the_base_bit_for_bit(model):
    params = init_params(model, jax.random.key(0))
    base = restack(partition(params, is_adapter)[1], [TINY.layers])
    without, _ = forward(TINY, base, tokens_of())
    assert np.array_equal(logits_of(model, params, tokens_of()), without)
    assert not np.array_equal(logits_of(model, busy(model), tokens_of()), without)


@pytest.mark.parametrize(
    ("target", "experts"), [("q", 1), ("q", 2), ("q", 4), ("q", 6), ("q", 8), ("down", 3)]
)
def test_outputs_and_gradients_equal_a_loop_in_float64(experts, target):
    spec = LoRASpec(experts, 4, min(2, experts), 1.5, 0.0, (target,), "top_k")
    rng = np.random.default_rng(experts)
    x, a = rng.normal(size=(1, 6, 16)), rng.normal(size=(16, experts, 4)) / 4
    b, router = rng.normal(size=(experts, 4, 12)) / 4, rng.normal(size=(16, experts)) / 2
    weight = rng.normal(size=(6, 12))

    def fast(x, a, b, router):
        adapter = {"a": a, "b": b} | ({"router": router} if experts > 1 else {})
        return (adapt(target, adapter, x, spec)[0][0] * weight).sum()

    def slow(x, a, b, router):
        return (
            reference.lora_experts(x[0], a, b, router if experts > 1 else None, spec.k, spec.scale)
            * weight
        ).sum()

    ours = jax.value_and_grad(fast, argnums=(0, 1, 2, 3))(
        *(jnp.asarray(v, jnp.float32) for v in (x, a, b, router))
    )
    with jax.enable_x64(True):
        expected = jax.value_and_grad(slow, argnums=(0, 1, 2, 3))(
            *(jnp.asarray(v, jnp.float64) for v in (x, a, b, router))
        )
        assert expected[0].dtype == jnp.float64
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(want).max()))


def test_ties_and_k():
    spec = LoRASpec(3, 1, 2, 1.0, 0.0, ("q",), "top_k")
    got = gates(jnp.array([[0.0, 0.0, 0.0], [1.0, 3.0, 2.0]]), spec)
    np.testing.assert_allclose(
        got, [[0.5, 0.5, 0], [0, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]], rtol=1e-6
    )


def test_cosine_gates_are_phatgooses():
    """Softmax over the two most parallel rows, both sides standardised, scaled by 1 / sqrt(I)."""
    spec = LoRASpec(3, 2, 2, 1.0, 0.0, ("q",), "cosine")
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(1, 5, 16)) + 0.3, rng.normal(size=(16, 3)) * 2 + 1
    a, b = rng.normal(size=(16, 3, 2)), rng.normal(size=(3, 2, 4))
    _, found = adapt(
        "q",
        {k: jnp.asarray(v, jnp.float32) for k, v in {"a": a, "b": b, "router": router}.items()},
        jnp.asarray(x),
        spec,
    )
    standard = lambda v: (v - v.mean(0)) / v.std(0)  # noqa: E731
    expected = standard(x[0].T).T @ standard(router) / np.sqrt(16)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_balance_loss_by_hand():
    """f: 5 of 8 choices fall on expert 0 ...; P: means of the softmax. Switch: E sum f P."""
    spec = LoRASpec(3, 1, 2, 1.0, 0.0, ("q",), "top_k")
    logits_BTE = jnp.log(
        jnp.array(
            [
                [
                    [0.7, 0.2, 0.1],
                    [0.6, 0.1, 0.3],
                    [0.1, 0.5, 0.4],
                    [0.5, 0.3, 0.2],
                    [0.9, 0.05, 0.05],
                ]
            ]
        )
    )
    valid = jnp.array([[True, True, True, True, False]])
    stats = router_statistics(logits_BTE, valid, spec)
    f, p = np.array([3, 3, 2]) / 8, np.array([1.9, 1.1, 1.0]) / 4
    np.testing.assert_allclose(stats.load_E, f, rtol=1e-6)
    assert float(stats.balance_loss) == pytest.approx(3 * (f * p).sum(), rel=1e-6)
    grad = jax.grad(lambda x: router_statistics(x, valid, spec).balance_loss)(logits_BTE)
    probs = jax.nn.softmax(logits_BTE)[0, 0]
    np.testing.assert_allclose(grad[0, 0], 3 / 4 * probs * (f - (f * probs).sum()), atol=1e-6)
    assert not np.asarray(grad[0, 4]).any()


def test_training_moves_the_experts_and_nothing_else(one_device):
    step = make_train_step(MOLA, COMPUTE, LORA_TRAIN, one_device, 16)
    state = init_state(MOLA, LORA_TRAIN, one_device, jax.random.key(0))
    before, losses = jax.device_get(state.params), []
    for _ in range(6):
        state, metrics = step(state, batch_of(), jax.random.key(7))
        losses.append(float(metrics.lm_loss))
    assert losses[-1] < losses[0]
    assert float(metrics.balance_loss) > 0
    after = named_leaves(jax.device_get(state.params))
    for name, was in named_leaves(before).items():
        assert np.array_equal(was, after[name]) != ("/lora/" in name), name


def test_a_base_in_bfloat16_costs_half_and_stays_there(one_device):
    train = dataclasses.replace(LORA_TRAIN, frozen_dtype="bfloat16")
    abstract, _ = state_shardings(MOLA, train, one_device)
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(abstract.params).items()}
    assert {
        str(dtype) for name, dtype in dtypes.items() if "/lora/" in name or "scale" in name
    } == {"float32"}
    assert {
        str(dtype) for name, dtype in dtypes.items() if "/lora/" not in name and "scale" not in name
    } == {"bfloat16"}
    params = jax.tree.map(
        lambda x, a: x.astype(a.dtype), init_params(MOLA, jax.random.key(0)), abstract.params
    )
    state = init_state(MOLA, train, one_device, params=params)
    step = make_train_step(MOLA, COMPUTE, train, one_device, 16)
    state, first = step(state, batch_of(), jax.random.key(7))
    state, second = step(state, batch_of(), jax.random.key(7))
    assert float(second.lm_loss) < float(first.lm_loss)
    assert state.params["embed"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_eight_devices_train_as_one_dropout_included(one_device):
    """Gradients of q and down pass through sharded inputs; dropout masks must not depend on the
    mesh."""
    lines = []
    for mesh in (one_device, make_mesh((1, 2, 2, 2))):
        train = dataclasses.replace(LORA_TRAIN, batch_size=8)
        model = dataclasses.replace(
            EVERYWHERE, lora=dataclasses.replace(EVERYWHERE.lora, dropout=0.3)
        )
        _, shardings = state_shardings(model, train, mesh)
        state = init_state(model, train, mesh, params=jax.device_put(busy(model), shardings.params))
        step = make_train_step(model, COMPUTE, train, mesh, 16)
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), batch_of())
        for _ in range(2):
            state, metrics = step(
                state, jax.device_put(batch, batch_sharding(mesh)), jax.random.key(7)
            )
        lines.append(
            (jax.device_get(metrics), jax.device_get(partition(state.params, is_adapter)[0]))
        )
    (one, params_one), (eight, params_eight) = lines
    assert float(eight.lm_loss) == pytest.approx(float(one.lm_loss), rel=1e-5)
    assert float(eight.balance_loss) == pytest.approx(float(one.balance_loss), rel=1e-5)
    assert float(eight.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-4)
    for name, leaf in named_leaves(params_one).items():
        np.testing.assert_allclose(named_leaves(params_eight)[name], leaf, atol=2e-4, err_msg=name)


def test_dropout_acts_in_training_alone():
    model = dataclasses.replace(MOLA, lora=dataclasses.replace(MOLA.lora, dropout=0.5))
    params = busy(model)
    plain, again = logits_of(model, params, tokens_of()), logits_of(model, params, tokens_of())
    dropped = logits_of(model, params, tokens_of(), dropout=jax.random.key(0))
    assert np.array_equal(plain, again)
    assert not np.allclose(plain, dropped, atol=1e-3)


def test_padding_and_neighbours_change_nothing():
    """A document's logits do not depend on what is packed after it."""
    params, tokens = busy(MOLA), tokens_of(1, 24)
    segments = jnp.where(jnp.arange(24) < 10, 1, 2)[None]
    packed, alone = (
        logits_of(MOLA, params, tokens, segments),
        logits_of(MOLA, params, tokens[:, :10]),
    )
    np.testing.assert_allclose(packed[:, :10], alone, atol=1e-5)


def test_a_mixture_s_attention_can_be_adapted():
    model = dataclasses.replace(MOE, lora=LoRAConfig("2", rank=(2,), targets=("q", "o")))
    _, stats = forward(model, busy(model), tokens_of())
    assert {name for name in stats if "/" in name} == {"layers_0/q", "layers_0/o"}
    assert "layers_0" in stats


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"allocation": "2,2"}, "2 numbers for 3 layers"),
        ({"allocation": "2,1,2"}, "k=2: more than the 1 expert of layer 1"),
        ({"k": (3,)}, "k=3: more than the 2 experts of layer 0"),
        ({"targets": ("q", "qq")}, r"targets\[1\]='qq'"),
        ({"targets": ("q", "q")}, "listed twice"),
        ({"targets": ()}, "targets: empty"),
        ({"rank": (4, 4)}, "rank: 2 numbers for 3 layers"),
        ({"rank": (0,)}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"gating": "sigmoid"}, "gates a single expert"),
    ],
)
def test_what_cannot_be_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(
            TINY, lora=dataclasses.replace(LoRAConfig("2,3,3", rank=(4,)), **change)
        )


def test_a_mixture_s_feed_forwards_are_refused():
    with pytest.raises(ConfigError, match="use its attention"):
        dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4)), lora=LoRAConfig("2"))


def test_every_target_has_a_place():
    assert set(PLACES) == set(LoRAConfig().targets)
