"""Experts with an anchor: every implementation compared with the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec, MoEConfig
from btx_jax.costs.model import train_flops
from btx_jax.errors import ConfigError
from btx_jax.models.layers import FeedForward
from btx_jax.models.llama import Llama, init_params, parameter_counts
from btx_jax.models.moe import MoEFeedForward, router_logits
from btx_jax.training.optimizer import is_trained
from tests import reference
from tests.models.test_llama import TINY

D, F = 16, 24


def params_of(experts, seed=0):
    """Parameters of the block and its anchor, with biases that matter."""
    shapes = {
        "gate": (experts, D, F), "up": (experts, D, F), "down": (experts, F, D),
        "router": (D, experts), "router_bias": (experts,),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(seed), 8)
    ffn = {n: jax.random.normal(k, s) / 3 for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    anchor = {
        name: jax.random.normal(k, shapes[name][1:]) / 3
        for k, name in zip(keys[5:], ("gate", "up", "down"), strict=True)
    }
    return ffn, anchor


def formula(x_MD, ffn, anchor, k):
    """The k largest among the experts' logits and 0, their softmax, and a loop over all."""
    logits = jnp.concatenate(
        [x_MD @ ffn["router"] + ffn["router_bias"], jnp.zeros((len(x_MD), 1))], 1
    )
    kth = jnp.sort(logits, axis=1)[:, -k][:, None]
    gates = jax.nn.softmax(jnp.where(logits >= kth, logits, -jnp.inf))
    weights = [jnp.concatenate([ffn[name], anchor[name][None]]) for name in ("gate", "up", "down")]
    return sum(
        gates[:, e : e + 1] * reference.swiglu(x_MD, *(w[e] for w in weights))
        for e in range(logits.shape[1])
    )


@pytest.mark.parametrize("dispatch", ["ragged", "einsum"])
@pytest.mark.parametrize(("experts", "k"), [(1, 2), (1, 1), (3, 1), (3, 2), (3, 4)])
def test_values_and_gradients_are_the_formulas(experts, k, dispatch):
    ffn, anchor = params_of(experts)
    x = jax.random.normal(jax.random.key(9), (2, 12, D))
    probe = jax.random.normal(jax.random.key(8), x.shape)
    valid = jnp.ones(x.shape[:2], bool).at[1, 7:].set(False)
    spec = LayerSpec(experts, k, "top_k", d_ff=F, anchor=True)
    compute = ComputeConfig(dtype="float32", dispatch=dispatch, group_size=12, capacity_factor=9.0)

    def block(x, ffn, anchor):
        y_anchor = FeedForward(F).apply({"params": anchor}, x)[0]
        return MoEFeedForward(F, spec, compute).apply({"params": ffn}, x, valid, 0, y_anchor)[0]

    def slow(x, ffn, anchor):
        return formula(x.reshape(-1, D), ffn, anchor, k).reshape(x.shape)

    def value(function):
        def at(*args):
            y = function(*args)
            return jnp.where(valid[..., None], y * probe, 0).sum(), jnp.where(
                valid[..., None], y, 0
            )

        return jax.jit(jax.grad(at, argnums=(0, 1, 2), has_aux=True))(x, ffn, anchor)

    for got, want in zip(*(jax.tree.leaves(value(f)) for f in (block, slow)), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4)
    if experts > 1 and k > 1:
        claims = MoEFeedForward(F, spec, compute).apply({"params": ffn}, x, valid, 0, x)[1].load_E
        assert claims.shape == (experts + 1,) and 0 < claims[-1] < 1


@pytest.mark.parametrize("width", [16, 300, 1024])
def test_an_experts_logit_does_not_depend_on_how_many_there_are(width):
    x = jax.random.normal(jax.random.key(0), (3, 50, width))
    router = jax.random.normal(jax.random.key(1), (width, 20))
    bias = jax.random.normal(jax.random.key(2), (20,))
    logits = jax.jit(router_logits)
    alone = np.concatenate(
        [logits(x, router[:, e : e + 1], bias[e : e + 1])[..., :1] for e in range(20)], -1
    )
    for count in (2, 3, 7, 8, 15, 20):
        together = np.asarray(logits(x, router[:, :count], bias[:count]))
        np.testing.assert_array_equal(together[..., :count], alone[..., :count])
        assert not together[..., count].any()


def test_it_is_counted():
    branch = dataclasses.replace(TINY, moe=MoEConfig((1,) * TINY.layers, anchor=True))
    mixture = dataclasses.replace(TINY, moe=MoEConfig((5,) * TINY.layers, k=2, anchor=True))
    feed_forwards = 3 * TINY.layers * TINY.d_model * TINY.d_ff
    row = TINY.layers * (TINY.d_model + 1)
    dense = parameter_counts(TINY)[0]
    assert parameter_counts(branch) == (dense + feed_forwards + row,) * 2
    assert parameter_counts(mixture) == (
        dense + 5 * (feed_forwards + row), dense + 2 * feed_forwards + 5 * row
    )  # fmt: skip
    spent = train_flops(branch, 1, lambda path: is_trained(path, "shared"))
    assert 4 * parameter_counts(branch)[1] < spent < train_flops(branch, 1)
    with pytest.raises(
        ConfigError, match="k=3: more than the 1 expert of layer 0 and their anchor"
    ):
        MoEConfig((1,), k=3, anchor=True)
    MoEConfig((1,), k=2, anchor=True)


def test_a_copy_beside_its_anchor_is_the_dense_model_to_the_last_bit():
    dense = init_params(TINY, jax.random.key(0))
    ffn = dense["layers_0"]["ffn"]
    zeros = jnp.zeros((TINY.layers, TINY.d_model, 1))
    own = {name: w[:, None] for name, w in ffn.items()} | {
        "router": zeros, "router_bias": zeros[:, 0]
    }  # fmt: skip
    both = dense | {"layers_0": dense["layers_0"] | {"ffn": own, "anchor": ffn}}
    branch = dataclasses.replace(TINY, moe=MoEConfig((1,) * TINY.layers, anchor=True))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, TINY.vocab_size)
    compute = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    one, other = (
        jax.jit(Llama(model, compute).apply)({"params": tree}, tokens, jnp.ones_like(tokens))[0]
        for model, tree in ((TINY, dense), (branch, both))
    )
    np.testing.assert_array_equal(one, other)
