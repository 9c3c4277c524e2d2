import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import TrainConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.errors import ConfigError
from btx_jax.models.int8 import gathered, trained_product
from btx_jax.models.layers import scaled_swiglu, swiglu
from btx_jax.models.moe import einsum_experts
from btx_jax.models.routing import Choice
from btx_jax.parallel.sharding import make_mesh
from btx_jax.presets import recipes
from btx_jax.training import start
from btx_jax.training.step import init_state, lower_train_step, make_train_step
from tests.models.test_llama import TINY
from tests.parallel import test_sharding
from tests.parallel.test_sharding import batch_of

COMPUTE = dataclasses.replace(test_sharding.COMPUTE, remat="none", quantize="int8")


def rounded(x):
    """Rows of x as int8 holds them, with one scale each, in float64."""
    scale = np.abs(np.float64(x)).max(axis=-1, keepdims=True) / 127.5
    return np.minimum(np.round(x / scale), 127) * scale


def held(kernel):
    """A kernel as int8 holds it, with one scale."""
    scale = np.abs(np.float64(kernel)).max(axis=(-2, -1), keepdims=True) / 127
    return np.round(kernel / scale) * scale


def twin(x, kernel):
    return rounded(x) @ held(kernel)


def back(dy, kernel):
    return rounded(dy) @ np.swapaxes(held(kernel), -1, -2)


def normal(seed, *shape):
    """Negative values are small: the largest of a row would lie between -127 and -128, at a last
    bit's mercy."""
    x = jax.random.normal(jax.random.key(seed), shape)
    return jnp.where(x < 0, x / 3, x)


def whole(kernel, quantize="int8"):
    return gathered(kernel, "embed", 0, quantize)


@pytest.mark.parametrize(("left", "right"), [((6, 32), (32, 16)), ((3, 6, 32), (3, 32, 16))])
def test_a_product_and_its_gradients_are_switchbacks(left, right):
    x, kernel = normal(0, *left), normal(1, *right)
    dy = normal(2, *left[:-1], right[-1])
    y, pull = jax.vjp(lambda x, kernel: trained_product(x, whole(kernel)), x, kernel)
    np.testing.assert_allclose(y, twin(x, kernel), rtol=1e-5, atol=1e-5)
    assert np.abs(y - x @ kernel).max() > 1e-3  # it rounds
    dx, dkernel = pull(dy)
    np.testing.assert_allclose(dx, back(dy, kernel), rtol=1e-5, atol=1e-5)
    exact = np.swapaxes(np.float64(x), -1, -2) @ dy
    np.testing.assert_allclose(dkernel, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(trained_product(x, whole(kernel, "none")), x @ kernel)


def test_a_kernel_of_zeros_gives_zeros():
    x, nothing = normal(0, 6, 32), jnp.zeros((32, 16))
    np.testing.assert_array_equal(trained_product(x, whole(nothing)), jnp.zeros((6, 16)))
    np.testing.assert_array_equal(trained_product(0 * x, whole(nothing)), jnp.zeros((6, 16)))


def test_a_gated_block_rounds_the_factors_of_six_of_its_nine_products():
    x, dy, scale = normal(0, 6, 32), normal(1, 6, 32), normal(2, 6)
    gate, up, down = normal(3, 32, 48), normal(4, 32, 48), normal(5, 48, 32)

    def block(x, scale, *kernels):
        return scaled_swiglu(x, scale, *map(whole, kernels))

    y, pull = jax.vjp(block, x, scale, gate, up, down)
    a, b = twin(x, gate), twin(x, up)
    s = 1 / (1 + np.exp(-a))
    column = np.float64(scale)[:, None]
    dh = back(dy, down)
    da, db = dh * column * b * (s + a * s * (1 - s)), dh * column * a * s
    want = (
        column * twin(a * s * b, down),
        back(da, gate) + back(db, up),
        (dh * a * s * b).sum(1),
        np.float64(x).T @ da,
        np.float64(x).T @ db,
        (a * s * b).T @ (dy * column),
    )
    for got, wanted in zip((y, *pull(dy)), want, strict=True):
        # One of 255 steps more or less, where float32 and float64 round to different ones.
        np.testing.assert_allclose(got, wanted, atol=2e-2 * np.abs(wanted).max())


def test_experts_reached_by_einsum_are_rounded_like_dense_ones():
    x_GSD = normal(0, 1, 8, 16)
    kernels = normal(1, 16, 32), normal(2, 16, 32), normal(3, 32, 16)
    every = [jnp.stack([w] * 3) for w in kernels]
    index_GSK = jnp.arange(8)[None, :, None] % 3
    choice = Choice(jnp.ones((1, 8, 1)), index_GSK, jnp.ones((1, 8, 3)) / 3)
    y_GSD, dropped = einsum_experts(x_GSD, choice, 1, 3.0, *every, "silu", "int8")
    assert dropped == 0
    want = swiglu(x_GSD[0], *map(whole, kernels))
    np.testing.assert_allclose(y_GSD[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [pytest.param((), marks=pytest.mark.slow), (4, 4, 4)])
def test_training_learns_as_without_and_eight_devices_as_one(experts):
    model = dataclasses.replace(TINY, moe=MoEConfig(experts) if experts else None)
    train = TrainConfig(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-2)

    def losses(devices, shape, **compute):
        mesh = make_mesh(shape, jax.devices()[:devices])
        state = init_state(model, train, mesh, jax.random.key(0))
        step = make_train_step(model, dataclasses.replace(COMPUTE, **compute), train, mesh, 32)
        found = []
        for i in range(4):
            state, metrics = step(state, batch_of(i % 2), jax.random.key(1))
            found.append((metrics.lm_loss, metrics.grad_norm))
        return np.asarray(found)

    int8 = losses(1, (1, 1, 1, 1))
    exact = losses(1, (1, 1, 1, 1), quantize="none")
    assert int8[0, 0] != exact[0, 0]
    assert int8[-1, 0] < int8[0, 0]
    np.testing.assert_allclose(int8[:, 0], exact[:, 0], rtol=1e-2)
    # A last bit can decide a rounding; later steps would differ by more.
    np.testing.assert_allclose(losses(8, (1, 4, 2, 1))[0], int8[0], rtol=1e-3)


def test_two_of_the_three_products_with_each_kernel_of_a_layer_are_of_int8():
    """The outputs and the gradients of inputs; not the gradients of kernels, nor the readout."""
    train = TrainConfig(steps=10, batch_size=8, warmup_steps=0)
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    dots = {}
    for quantize in ("none", "int8"):
        compute = dataclasses.replace(COMPUTE, quantize=quantize)
        (part,) = lower_train_step(TINY, compute, train, mesh, 32)
        lines = part.program.as_text().splitlines()
        dots[quantize] = [line for line in lines if "dot_general" in line]
    assert len(dots["int8"]) == len(dots["none"])
    assert not [line for line in dots["none"] if "xi8>" in line]
    of_int8 = [line for line in dots["int8"] if "xi8>" in line]
    assert len(of_int8) == 2 * 7  # the layers are one loop


def test_what_is_not_quantized_is_refused(monkeypatch):
    config = recipes.seed("tiny")
    model = dataclasses.replace(config.model, moe=MoEConfig((4,) * config.model.layers))

    def check(model, dispatch):
        compute = dataclasses.replace(config.compute, quantize="int8", dispatch=dispatch)
        start.checked_mesh(dataclasses.replace(config, compute=compute), model)

    check(config.model, "auto")
    check(model, "einsum")
    with pytest.raises(ConfigError, match=r"quantize='int8': .*ragged.*dispatch to 'einsum'"):
        check(model, "auto")
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantize: needs a package: .*btx_jax\[int8\]"):
        check(config.model, "auto")
