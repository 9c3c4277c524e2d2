"""Kernels for GPUs: cuDNN's attention and tokamax's grouped matmuls. None runs here; programs are
lowered for an H100, and other implementations of the same arguments give the same values."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.errors import ConfigError
from btx_jax.models.attention import attend
from btx_jax.models.cudnn import cudnn_attend, is_possible
from btx_jax.models.grouped import grouped_swiglu
from btx_jax.models.layers import platform_kernels
from btx_jax.models.ragged import ragged_experts


@pytest.fixture
def h100(monkeypatch):
    """An H100, as far as lowering programs for one asks."""
    from jax._src.cudnn import fused_attention_stablehlo
    from tokamax._src import gpu_utils
    from tokamax._src.ops import op

    class Device:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"
        compute_capability, core_count, id = "9.0", 132, 0

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    for module in (gpu_utils.backend, op.backend):
        monkeypatch.setattr(module, "get_default_device", Device)


def inputs(kv_heads, width=32, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, kv_heads, 4 // kv_heads, 384, width), dtype)
    k, v = (jax.random.normal(key, (2, kv_heads, 384, width), dtype) for key in keys[1:3])
    probe = jax.random.normal(keys[4], q.shape, dtype)
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.02, (2, 384)), axis=1)
    return (q, k, v), segments, probe


def gradients(f, probe):
    return jax.jit(jax.value_and_grad(lambda *a: (f(*a) * probe).sum(), argnums=(0, 1, 2)))


@pytest.mark.parametrize(
    ("kv_heads", "window", "scale"), [(1, 0, 0), (2, 0, 0.3), (4, 0, 0), (2, 100, 0), (2, 1, 0)]
)
def test_its_arguments_say_what_attend_computes(kv_heads, window, scale):
    """By jax's own attention, which takes the same arguments on any device."""
    heads, segments, probe = inputs(kv_heads)
    results = [
        gradients(f, probe)(*heads)
        for f in (
            lambda *a: cudnn_attend(*a, segments, window, scale, "xla"),
            lambda *a: attend(*a, segments, window, scale),
        )
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 100])
def test_a_gpu_s_program_calls_cudnn_forward_and_backward(h100, window):
    heads, segments, probe = inputs(2, dtype="bfloat16")
    step = gradients(lambda *a: cudnn_attend(*a, segments, window), probe)
    text = step.trace(*heads).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == {
        "__cudnn$fmhaScaleBiasSoftmax",
        "__cudnn$fmhaScaleBiasSoftmaxBackward",
    }
    assert set(re.findall(r"\\22mask_type\\22: \\22(\w+)", text)) == {"CAUSAL"}
    assert set(re.findall(r"\\22sliding_window_length\\22: (\d+)", text)) == {str(window)}
    assert "4x384x384" not in text, "scores of every head"


def test_what_cudnn_cannot_compute_is_left_to_xla():
    (q, *_), _, _ = inputs(2, dtype="bfloat16")
    assert is_possible(q, 0.0)
    assert not is_possible(q, 30.0)
    assert not is_possible(q.astype(jnp.float32), 0.0)
    assert not is_possible(q[..., :12], 0.0)
    assert not is_possible(jnp.tile(q, 8), 0.0)  # a head of 256


def expert_weights(width=256, hidden=384, experts=3):
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    return tuple(
        (jax.random.normal(key, shape) * shape[1] ** -0.5).astype("bfloat16")
        for key, shape in zip(keys, shapes, strict=True)
    )


@pytest.mark.parametrize(
    ("rows", "hidden", "kernel"),
    [
        (640, 384, "mosaic_gpu_v2"),
        (600, 384, "__gpu$xla.gpu.triton"),
        (640, 200, "__gpu$xla.gpu.triton"),
    ],
)
def test_a_gpu_s_program_multiplies_no_row_by_every_expert(h100, caplog, rows, hidden, kernel):
    shaped = jax.ShapeDtypeStruct

    def loss(x, sizes, *weights):
        return grouped_swiglu(x, sizes, weights, 256, "cuda").astype("float32").sum()

    caplog.set_level(logging.WARNING)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4)))
    traced = step.trace(
        shaped((rows, 256), "bfloat16"), shaped((3,), "int32"), *expert_weights(hidden=hidden)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    called = re.findall(r"custom_call @([^(]+)", text)
    assert called == 9 * [kernel]  # three matmuls, each in three roles
    assert "stablehlo.dot_general" not in text
    assert not caplog.records, "tokamax's advice on tuning"


def test_rows_of_no_expert_leave_no_trace(monkeypatch):
    """Kernels leave something in them, forward and backward, and it may be no number."""
    import tokamax

    def stain(x, sizes):
        return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, jnp.nan)

    def spread(x):
        """One entry that is no number spoils all: rows of different experts share tiles."""
        return x * jnp.where(jnp.isfinite(x).all(), 1, jnp.nan)

    @jax.custom_vjp
    def kernel_in(x, sizes):
        return spread(x)

    @jax.custom_vjp
    def kernel_out(y, sizes):
        return stain(y, sizes)

    kernel_in.defvjp(lambda x, sizes: (spread(x), sizes), lambda sizes, d: (stain(d, sizes), None))
    kernel_out.defvjp(lambda y, sizes: (stain(y, sizes), sizes), lambda _, d: (spread(d), None))

    def ragged_dot(rows, kernel, sizes, implementation):
        return kernel_out(jax.lax.ragged_dot(kernel_in(rows, sizes), kernel, sizes), sizes)

    monkeypatch.setattr(tokamax, "ragged_dot", ragged_dot)
    x = jax.random.normal(jax.random.key(0), (300, 256), "bfloat16")
    index = jax.random.randint(jax.random.key(1), (300, 2), 0, 3).at[250:].set(3)  # padding
    gate = jnp.where(index < 3, 0.5, 0)

    def run(kernels):
        f = lambda x, *w: (ragged_experts(x, gate, index, *w, kernels) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=range(4)))(x, *expert_weights())

    for a, b in zip(*(jax.tree.leaves(run(kernels)) for kernels in ("cuda", "xla")), strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_kernels_of_another_platform_are_refused():
    assert platform_kernels("auto", "cpu") == platform_kernels("auto", "gpu") == "xla"
    assert platform_kernels("cuda", "gpu") == "cuda"
    for kernels, platform, home in (("cuda", "cpu", "GPU"), ("pallas", "gpu", "TPU")):
        with pytest.raises(ConfigError, match=f"made for a {home}, and this runs on a"):
            platform_kernels(kernels, platform)
