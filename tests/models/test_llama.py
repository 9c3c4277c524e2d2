import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig, MoEConfig, RopeScaling
from btx_jax.mixing.mix import mix_params, restack, upcycle_params
from btx_jax.mixing.router import normal_routers
from btx_jax.models.attention import attend, rope_frequencies, rotate
from btx_jax.models.llama import Llama, abstract_params, init_params, logits, parameter_counts
from btx_jax.models.splash import splash_attend
from btx_jax.presets.recipes import LLAMA2_7B
from tests import reference

TINY = ModelConfig(
    vocab_size=64, layers=3, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, context=128
)
MOE = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4)))
FP32 = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")


def tokens_of(batch=2, length=24, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)


def forward(model, params, tokens, segments=None, compute=FP32, **kwargs):
    segments = jnp.ones_like(tokens) if segments is None else segments

    @jax.jit
    def run(params):
        hidden, stats = Llama(model, compute).apply({"params": params}, tokens, segments, **kwargs)
        return logits(params, hidden), stats

    return run(params)


@pytest.mark.parametrize(("k", "active"), [(2, 11.07e9), (1, 6.74e9)], ids=["top-2", "top-1"])
def test_parameter_counts_of_the_paper(k, active):
    """The paper's sizes; another number means another architecture (a missing leaf, a router per
    linear map, a tied head)."""
    dense, _ = parameter_counts(LLAMA2_7B)
    total, used = parameter_counts(dataclasses.replace(LLAMA2_7B, moe=MoEConfig((4,) * 32, k=k)))
    assert dense == 6_738_415_616
    assert round(total / 1e9, 2) == 19.72
    assert used == pytest.approx(active, abs=0.005e9)


def test_attention_in_query_blocks_equals_one_head_at_a_time():
    keys = jax.random.split(jax.random.key(0), 4)
    for length in (40, 130, 600):  # one block, several, more than eight of the smallest
        q = jax.random.normal(keys[0], (2, 4, length, 8))
        k, v = (jax.random.normal(key, (2, 2, length, 8)) for key in keys[1:3])
        segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.05, (2, length)), axis=1)

        def fast(q, k, v, segments=segments):
            return attend(q.reshape(2, 2, 2, *q.shape[2:]), k, v, segments).reshape(q.shape)

        slow = lambda q, k, v: reference.attention(q, k, v, segments)  # noqa: E731, B023
        np.testing.assert_allclose(fast(q, k, v), slow(q, k, v), atol=2e-5)
        grads = [
            jax.jit(jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2)))(q, k, v)
            for f in (fast, slow)
        ]
        for a, b in zip(*grads, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_a_window_is_a_mask_that_is_never_made():
    """`attend` computes only the keys that its blocks see; the slow twin masks all of them."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 4, 300, 8))
    k, v = (jax.random.normal(key, (2, 2, 300, 8)) for key in keys[1:3])
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (2, 300)), axis=1)
    place = np.arange(300)
    for window in (1, 7, 64, 299, 300):
        fast = attend(q.reshape(2, 2, 2, 300, 8), k, v, segments, window).reshape(q.shape)
        scores = jnp.einsum("bhtk,bhsk->bhts", q, jnp.repeat(k, 2, 1)) / np.sqrt(8)
        seen = (place[:, None] >= place) & (place[:, None] - place < window)
        seen = seen & (segments[:, :, None] == segments[:, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        slow = jnp.einsum("bhts,bhsk->bhtk", weights, jnp.repeat(v, 2, 1))
        np.testing.assert_allclose(fast, slow, atol=2e-5, err_msg=str(window))


@pytest.mark.parametrize(
    ("kv_heads", "window", "scale", "cap"),
    [
        *((1, 0, 0, 0), (2, 0, 0, 0), (4, 0, 0, 0), (2, 100, 0, 0), (2, 257, 0, 0)),
        *((2, 100, 0.3, 2.0), (2, 0, 0.0, 1.5)),
    ],
)
def test_splash_attention_equals_attend(kv_heads, window, scale, cap):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, kv_heads, 4 // kv_heads, 384, 32))
    k, v = (jax.random.normal(key, (2, kv_heads, 384, 32)) for key in keys[1:3])
    probe = jax.random.normal(keys[4], q.shape)
    segments = jnp.cumsum(
        jax.random.bernoulli(keys[3], 0.02, (2, 384)), axis=1
    )  # 0, padding, first
    results = []
    for f in (
        lambda *a: splash_attend(*a, segments, window, True, scale, cap),
        lambda *a: attend(*a, segments, window, scale, cap),
    ):
        results.append(
            jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) * probe).sum(), argnums=(0, 1, 2)))(
                q, k, v
            )
        )
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_remat_policies_name_what_the_backward_pass_finds():
    """A name that no longer exists would save nothing, and only speed would suffer."""
    params = init_params(TINY, jax.random.key(0))

    def products(remat):
        compute = dataclasses.replace(FP32, remat=remat)
        text = str(
            jax.make_jaxpr(
                jax.grad(lambda p: forward(TINY, p, tokens_of(), compute=compute)[0].sum())
            )(params)
        )
        return text.count("dot_general")

    full, attention, ffn, none = (products(remat) for remat in ("full", "attention", "ffn", "none"))
    assert full - attention >= 4, (
        "queries, keys, values and the output projection are computed again under `attention`"
    )
    assert attention - ffn == 2, "gate and up products are computed again under `ffn`"
    assert ffn >= none


def test_rope_rotates_halves_and_depends_on_distance_only():
    frequencies = rope_frequencies(8, 10_000.0, RopeScaling())
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (8,))
    at = lambda position: rotate(x[None, None, None], np.array([[position]]) * frequencies)[0, 0, 0]  # noqa: E731
    np.testing.assert_allclose(at(0), x, atol=1e-6)
    np.testing.assert_allclose(at(5) @ at(3), at(102) @ at(100), rtol=1e-4)
    np.testing.assert_allclose(at(1)[0], x[0] * np.cos(1) - x[4] * np.sin(1), rtol=1e-5)


def test_rope_scaling():
    plain = rope_frequencies(128, 500_000.0, RopeScaling())
    np.testing.assert_allclose(
        rope_frequencies(128, 500_000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6
    )
    llama31 = rope_frequencies(128, 500_000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    high, low = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(llama31[high], plain[high], rtol=1e-6)
    np.testing.assert_allclose(llama31[low], plain[low] / 8, rtol=1e-6)
    between = ~high & ~low
    assert between.any()
    assert ((llama31[between] < plain[between]) & (llama31[between] > plain[between] / 8)).all()


@pytest.mark.parametrize(
    "model", [TINY, MOE, dataclasses.replace(TINY, tied_head=True)], ids=["dense", "moe", "tied"]
)
def test_causality_and_packing_by_gradients(model):
    """A position's logits have no gradient from later tokens or from other documents, and have one
    from earlier tokens of their own document."""
    params = init_params(model, jax.random.key(0))
    tokens = tokens_of(1, 24)
    segments = jnp.array([[1] * 9 + [2] * 11 + [0] * 4])

    def total(embedded_delta, position):
        table = params["embed"]["embedding"]
        # A perturbation of each position's embedding, through a table with one row per position.
        rows = jnp.concatenate([table, table[tokens[0]] + embedded_delta])
        changed = {**params, "embed": {"embedding": rows}}
        changed.pop("head", None)
        wide = dataclasses.replace(model, vocab_size=64 + 24, tied_head=True)
        hidden, _ = Llama(wide, FP32).apply(
            {"params": changed}, 64 + jnp.arange(24)[None], segments
        )
        return jnp.sin(hidden[0, position]).sum()

    gradient_of = jax.jit(jax.grad(total))
    for position in (4, 8, 9, 15):
        gradient = np.abs(gradient_of(jnp.zeros((24, 32)), position)).max(axis=1)
        own = np.array(segments[0] == segments[0, position]) & (np.arange(24) <= position)
        assert (gradient[~own] == 0).all(), (
            f"position {position} sees what it must not: {np.flatnonzero(gradient * ~own)}"
        )
        assert (gradient[own] > 0).all()


def test_packed_documents_give_the_logits_of_each_document_alone():
    params = init_params(MOE, jax.random.key(0))
    tokens = tokens_of(1, 20)
    segments = jnp.array([[1] * 8 + [2] * 12])
    packed, _ = forward(MOE, params, tokens, segments)
    np.testing.assert_allclose(packed[:, :8], forward(MOE, params, tokens[:, :8])[0], atol=1e-4)
    np.testing.assert_allclose(packed[:, 8:], forward(MOE, params, tokens[:, 8:])[0], atol=1e-4)


@pytest.mark.parametrize(("routing", "k"), [("top_k", 1), ("top_k", 2), ("soft", 2)])
@pytest.mark.parametrize("dispatch", ["einsum", "ragged"])
def test_a_mix_of_equal_experts_is_the_seed_for_any_router(routing, k, dispatch):
    seed = init_params(TINY, jax.random.key(0))
    model = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4), k=k, routing=routing))
    routers = normal_routers(jax.random.key(5), [("layers_0", 3, 4)], 32, std=1.0)
    compute = dataclasses.replace(FP32, dispatch=dispatch, capacity_factor=4 / k, group_size=8)
    want, _ = forward(TINY, seed, tokens_of())
    for mixture in (mix_params([seed] * 4, routers), upcycle_params(seed, 4, routers)):
        got, stats = forward(model, mixture, tokens_of(), compute=compute)
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert float(stats["layers_0"].dropped.max()) == pytest.approx(0, abs=1e-6)


def test_router_gets_an_lm_gradient_except_for_top_1():
    def router_gradient(routing, k, rngs=None):
        model = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4), k=k, routing=routing))
        params = init_params(model, jax.random.key(0))

        def loss(params):
            hidden, _ = Llama(model, FP32).apply(
                {"params": params}, tokens_of(), jnp.ones_like(tokens_of()), rngs=rngs or {}
            )
            return jnp.sin(hidden * 3).sum()

        return np.abs(jax.jit(jax.grad(loss))(params)["layers_0"]["ffn"]["router"]).max(axis=(1, 2))

    assert (router_gradient("top_k", 1) == 0).all(), (
        "SoftMax(TopK) with k = 1 weighs its expert 1, whatever the router says"
    )
    for routing, k, rngs in (
        ("top_k", 2, None),
        ("switch", 1, None),
        ("soft", 1, None),
        ("sample_top1", 1, {"routing": jax.random.key(0)}),
    ):
        assert (router_gradient(routing, k, rngs) > 0).all(), routing


def test_balance_loss_reaches_the_router_of_every_scanned_layer():
    """A sown loss whose path no longer matches gives zeros here; so does a scan that returns only
    its last layer's."""
    for model in (
        MOE,
        dataclasses.replace(
            MOE, moe=MoEConfig((4, 4, 4), routing="sample_top1", first_routing="soft")
        ),
    ):
        params = init_params(model, jax.random.key(0))

        def total(params, model=model):
            _, stats = forward(model, params, tokens_of(), rngs={"routing": jax.random.key(3)})
            return sum(run.balance_loss.sum() for run in stats.values())

        grads = jax.jit(jax.grad(total))(params)
        for name, length, _ in model.runs():
            norms = np.abs(grads[name]["ffn"]["router"]).max(axis=(1, 2))
            assert norms.shape == (length,)
            assert (norms > 0).all(), f"{name}: layers {np.flatnonzero(norms == 0)} get no gradient"


def test_runs_of_equal_layers():
    assert [r[:2] for r in MOE.runs()] == [("layers_0", 3)]
    mixed = dataclasses.replace(TINY, layers=5, moe=MoEConfig((0, 2, 2, 4, 0), k=2))
    assert [(name, length, spec.experts) for name, length, spec in mixed.runs()] == [
        ("layers_0", 1, 0), ("layers_1", 2, 2), ("layers_2", 1, 4), ("layers_3", 1, 0),
    ]  # fmt: skip
    params = init_params(mixed, jax.random.key(0))
    _, stats = forward(mixed, params, tokens_of())
    assert {name: run.load_E.shape for name, run in stats.items()} == {
        "layers_1": (2, 2),
        "layers_2": (1, 4),
    }
    first_soft = dataclasses.replace(
        TINY, moe=MoEConfig((4, 4, 4), routing="sample_top1", first_routing="soft")
    )
    assert [spec.routing for _, _, spec in first_soft.runs()] == ["soft", "sample_top1"]


def test_restacked_runs_are_the_same_model():
    params = init_params(TINY, jax.random.key(0))
    again = restack(restack(params, [1, 2]), [3])
    chex.assert_trees_all_equal(params, again)
    with pytest.raises(ValueError, match="model of 3"):
        restack(params, [1, 1])


@functools.cache
def gradient(compute):
    def loss(params):
        out, _ = forward(MOE, params, tokens_of(), compute=compute)
        return jnp.sin(out).sum()

    return jax.jit(jax.grad(loss))(init_params(MOE, jax.random.key(0)))


@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", 1), ("full", 3), ("attention", 3), ("ffn", 3), ("offload", 1)]
)
def test_remat_and_unroll_change_no_gradient(remat, unroll):
    got = gradient(dataclasses.replace(FP32, remat=remat, unroll=unroll))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient(FP32)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_offload_keeps_keys_and_values_on_the_device_and_the_rest_on_the_host():
    params = init_params(TINY, jax.random.key(0))
    tokens, compute = tokens_of(), dataclasses.replace(FP32, remat="offload")

    def loss(params):
        return jnp.sin(forward(TINY, params, tokens, compute=compute)[0]).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    batch, length = tokens.shape
    residual = f"[{TINY.layers},{batch},{length},{TINY.d_model}]"
    heads = f"{length},{TINY.head_dim}]"
    groups = TINY.heads // TINY.kv_heads
    keys = f"[{TINY.layers},{batch},{TINY.kv_heads},{heads}"
    queries = f"[{TINY.layers},{batch},{TINY.kv_heads},{groups},{heads}"
    for shape, is_on_host in ((residual, True), (queries, True), (keys, False)):
        assert (f"f32<host>{shape}" in text) == is_on_host
        assert (f"f32{shape}" in text) != is_on_host


def test_bfloat16_compute_stays_near_float32():
    params = init_params(MOE, jax.random.key(0))
    want, _ = forward(MOE, params, tokens_of())
    got, stats = forward(
        MOE, params, tokens_of(), compute=dataclasses.replace(FP32, dtype="bfloat16")
    )
    assert got.dtype == jnp.float32
    assert stats["layers_0"].entropy.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.03)


def test_shapes_are_found_under_any_mesh():
    from btx_jax.parallel.sharding import make_mesh

    model = dataclasses.replace(TINY, d_model=40)  # not used elsewhere, so not compiled yet
    with jax.set_mesh(make_mesh((2, 2, 2, 1))):
        assert abstract_params(model)["embed"]["embedding"].value.shape == (TINY.vocab_size, 40)
