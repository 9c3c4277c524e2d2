import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec
from btx_jax.models import grouped
from btx_jax.models.layers import swiglu
from btx_jax.models.moe import MoEFeedForward, einsum_experts
from btx_jax.models.ragged import ragged_experts
from btx_jax.models.routing import route
from tests import reference

D, F, E = 16, 24, 4


def expert_weights(seed=1, experts=E):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.random.normal(k, s) / 4
        for k, s in zip(keys, [(experts, D, F), (experts, D, F), (experts, F, D)], strict=True)
    ]


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(E, 1, "top_k"),
        LayerSpec(E, 2, "top_k"),
        LayerSpec(E, 1, "switch"),
        LayerSpec(E, E, "soft"),
    ],
)
@pytest.mark.parametrize("block", [8, 128])
def test_einsum_equals_ragged_equals_a_loop_over_experts(spec, block, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", block)
    x = jax.random.normal(jax.random.key(0), (3, 32, D))
    router = jax.random.normal(jax.random.key(2), (D, E))
    valid = jnp.arange(32)[None] < jnp.array([32, 20, 1])[:, None]
    probe = jax.random.normal(jax.random.key(3), (3, 32, D))

    def run(method):
        def value(x, router, *weights):
            choice = route(x @ router, valid, spec, None, jnp.int32(0))
            flat = [a.reshape(-1, a.shape[-1]) for a in (x, choice.gate_GSK, choice.index_GSK)]
            if method == "einsum":
                y, dropped = einsum_experts(x, choice, spec.k, E / spec.k, *weights)
                dropped_too = dropped * 0 + y
            elif method == "ragged":
                dropped_too = ragged_experts(*flat, *weights).reshape(x.shape)
            else:
                dropped_too = reference.loop_over_experts(*flat, *weights).reshape(x.shape)
            return (dropped_too * probe).sum(), dropped_too

        grads, y = jax.jit(jax.grad(value, argnums=range(5), has_aux=True))(
            x, router, *expert_weights()
        )
        return [y, *grads]

    want = run("loop")
    for method in ("einsum", "ragged"):
        for name, got, expected in zip(
            ("y", "x", "router", "gate", "up", "down"), run(method), want, strict=True
        ):
            np.testing.assert_allclose(
                got, expected, atol=2e-5, rtol=1e-4, err_msg=f"{method}: {name}"
            )


@pytest.mark.parametrize("tokens", [40, 300])
def test_every_platform_s_ragged_path_is_the_same_function(monkeypatch, tokens):
    """`platform_dependent` picks ragged_dot on a GPU; here its branch is run explicitly, as is
    megablox, interpreted, as on a TPU."""
    x = jax.random.normal(jax.random.key(0), (tokens, D))
    index = (
        jax.random.randint(jax.random.key(1), (tokens, 2), 0, E).at[tokens - 10 :].set(E)
    )  # padding
    gate = jnp.where(index < E, 0.5, 0)

    def run(branch, kernels="xla"):
        monkeypatch.setattr(
            jax.lax,
            "platform_dependent",
            lambda *args, cpu, default: {"cpu": cpu, "default": default}[branch](*args),
        )
        f = lambda x, *w: (ragged_experts(x, gate, index, *w, kernels) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(f, argnums=range(4))(x, *expert_weights())

    want = jax.tree.leaves(run("cpu"))
    for got in (run("default"), run("cpu", "pallas_interpret")):
        for a, b in zip(jax.tree.leaves(got), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("width", "hidden"), [(576, 1536), (96, 200), (1536, 8960), (2048, 3000)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_megablox_has_tiles_that_a_tpu_takes_whatever_the_widths(width, hidden, dtype):
    """Lowered for a TPU, forward and backward; a tile is a whole dimension or a multiple of 128."""

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = (shaped(3, width, hidden), shaped(3, width, hidden), shaped(3, hidden, width))
    sizes = jax.ShapeDtypeStruct((3,), "int32")

    def loss(x, sizes, *weights):
        return grouped.grouped_swiglu(x, sizes, weights, 256, "pallas").astype("float32").sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4)))
    lowered = export.export(step, platforms=["tpu"])(shaped(600, width), sizes, *weights)
    assert lowered.mlir_module().count("tpu_custom_call") == 6  # of two shapes, each in three roles


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_equal_experts_agree_bit_for_bit_however_they_are_weighted(tokens):
    """Rounding here would grow through the layers of a real model: SmolLM2 upcycled would miss its
    own logits by 1e-4."""
    x = jax.random.normal(jax.random.key(0), (tokens, D))
    one = [w[0] for w in expert_weights()]
    logits, index = jax.lax.top_k(jax.random.normal(jax.random.key(1), (tokens, E)), 3)
    got = jax.jit(ragged_experts)(
        x, jax.nn.softmax(logits), index, *(jnp.stack([w] * E) for w in one)
    )
    np.testing.assert_array_equal(got, jax.jit(swiglu)(x, *one))


def test_one_router_serves_the_whole_feed_forward_block():
    module = MoEFeedForward(F, LayerSpec(E, 2, "top_k"), ComputeConfig(dtype="float32"))
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 8, D)), jnp.ones((1, 8), bool), jnp.int32(0)
    )["params"]
    assert {k: v.value.shape for k, v in shapes.items()} == {
        "router": (D, E),
        "gate": (E, D, F),
        "up": (E, D, F),
        "down": (E, F, D),
    }


def test_a_crowded_expert_drops_tokens_under_einsum_and_none_under_ragged():
    compute = ComputeConfig(dtype="float32", capacity_factor=1.0, group_size=16)
    x = jnp.ones((2, 32, D))  # equal tokens all choose the same experts
    for dispatch, dropped in (("einsum", 0.5), ("ragged", 0.0)):
        module = MoEFeedForward(
            F, LayerSpec(E, 2, "top_k"), dataclasses.replace(compute, dispatch=dispatch)
        )
        variables = module.init(jax.random.key(0), x, jnp.ones((2, 32), bool), jnp.int32(0))
        _, stats = module.apply(variables, x, jnp.ones((2, 32), bool), jnp.int32(0))
        assert float(stats.dropped) == pytest.approx(dropped)
