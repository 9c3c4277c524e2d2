"""Kernels for GPUs: cuDNN's attention, and grouped matmuls on Hopper. Without a GPU, programs are
lowered for an H100, and other implementations of the same arguments give the same values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from btx_jax.errors import ConfigError
from btx_jax.models.attention import attend
from btx_jax.models.cudnn import cudnn_attend, is_possible
from btx_jax.models.grouped import grouped_swiglu
from btx_jax.models.layers import platform_kernels
from btx_jax.models.llama import remat_policy
from btx_jax.models.ragged import ragged_experts


@pytest.fixture
def h100(monkeypatch):
    """An H100, as far as lowering programs for one asks."""
    from jax._src.cudnn import fused_attention_stablehlo

    class Device:
        platform, device_kind, core_count = "gpu", "NVIDIA H100 80GB HBM3", 132
        compute_capability = "9.0"

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "devices", lambda *_: [Device])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    return Device


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


@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("attention", 1), ("ffn", 1)])
def test_cudnn_s_forward_pass_runs_again_only_if_its_results_were_not_kept(h100, remat, times):
    heads, segments, probe = inputs(2, dtype="bfloat16")
    layer = jax.checkpoint(lambda *a: 2 * cudnn_attend(*a, segments, 0), policy=remat_policy(remat))
    step = gradients(layer, probe)
    text = step.trace(*heads).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"__cudnn\$fmhaScaleBiasSoftmax\(", text)) == times
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward") == 1


def test_what_cudnn_cannot_compute_is_left_to_xla():
    assert is_possible(384, 64, 0.0, jnp.bfloat16)
    assert not is_possible(384, 64, 30.0, jnp.bfloat16)
    assert not is_possible(384, 64, 0.0, jnp.float32)
    assert not is_possible(384, 12, 0.0, jnp.bfloat16)
    assert not is_possible(384, 256, 0.0, jnp.bfloat16)
    assert not is_possible(383, 64, 0.0, jnp.bfloat16)


def expert_weights(width=256, hidden=384, experts=3):
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    return tuple(
        (jax.random.normal(key, shape) * shape[1] ** -0.5).astype("bfloat16")
        for key, shape in zip(keys, shapes, strict=True)
    )


def lowered_swiglu(rows, hidden):
    """The program of a SwiGLU of grouped rows with its gradients, for a GPU."""
    shaped = jax.ShapeDtypeStruct

    def loss(x, sizes, *weights):
        return grouped_swiglu(x, sizes, weights, 256, "cuda").astype("float32").sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4)))
    traced = step.trace(
        shaped((rows, 256), "bfloat16"), shaped((3,), "int32"), *expert_weights(hidden=hidden)
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows", [640, 600])
def test_a_hopper_s_program_multiplies_no_row_by_every_expert(h100, rows):
    text = lowered_swiglu(rows, 384)
    called = re.findall(r"custom_call @([^(]+)", text)
    assert called == 9 * ["mosaic_gpu_v2"]  # three matmuls, each in three roles
    assert "stablehlo.dot_general" not in text


def test_other_gpus_widths_and_few_rows_are_left_to_xla(h100, monkeypatch):
    for rows, hidden in ((640, 200), (100, 384)):
        assert "mosaic" not in lowered_swiglu(rows, hidden)
    monkeypatch.setattr(h100, "compute_capability", "8.0")
    assert "mosaic" not in lowered_swiglu(640, 384)


@pytest.fixture
def stained(monkeypatch):
    """Kernels of the same arguments as Hopper's that run anywhere. What they leave in rows of no
    expert is no number, and one such number among what they read spoils all that they write: rows
    of different experts share tiles."""

    def spread(x):
        return x * jnp.where(jnp.isfinite(x).all(), 1, jnp.nan)

    def multiply(rows, kernel, group_sizes, transpose_rhs=False, **_):
        kernel = kernel.mT if transpose_rhs else kernel
        y = jax.lax.ragged_dot(rows if transpose_rhs else spread(rows), kernel, group_sizes)
        return jnp.where((jnp.arange(len(y)) < group_sizes.sum())[:, None], y, jnp.nan)

    def weights(rows, dy, group_sizes, **_):
        ends = jnp.cumsum(group_sizes)
        expert = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
        own = expert[:, None] == jnp.arange(len(group_sizes))
        products = jnp.einsum("re,rd,rf->edf", own.astype(rows.dtype), spread(rows), spread(dy))
        return products.astype(rows.dtype)

    monkeypatch.setattr(ragged_dot_mgpu, "ragged_dot", multiply)
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "transposed_ragged_dot", weights)


def test_rows_of_no_expert_leave_no_trace(h100, stained):
    x = jax.random.normal(jax.random.key(0), (300, 256), "bfloat16")
    index = jax.random.randint(jax.random.key(1), (300, 2), 0, 3).at[250:].set(3)  # padding
    gate = jnp.where(index < 3, 0.5, 0)

    def run(kernels):
        f = lambda x, *w: (ragged_experts(x, gate, index, *w, kernels) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=range(4)))(x, *expert_weights())

    for a, b in zip(*(jax.tree.leaves(run(kernels)) for kernels in ("cuda", "xla")), strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("sizes", [(300, 200, 400), (0, 10, 690), (0, 900, 0), (1000, 0, 0)])
def test_each_row_is_multiplied_by_its_own_expert(h100, stained, sizes):
    """Of 1000 rows, those behind the last expert's belong to none."""
    weights, is_own = expert_weights(), jnp.arange(1000) < sum(sizes)
    x, probe = jax.random.normal(jax.random.key(0), (2, 1000, 256), "bfloat16")

    def all_of(swiglu, dtype):
        def loss(x, *w):
            y = jnp.where(is_own[:, None], swiglu(x, jnp.array(sizes, "int32"), w), 0)
            return (y * probe).astype("float32").sum()

        cast = (a.astype(dtype) for a in (x, *weights))
        dx, *dw = jax.jit(jax.grad(loss, argnums=range(4)))(*cast)
        return jnp.where(is_own[:, None], dx, 0), *dw

    def every(x, sizes, weights):
        gate, up, down = weights
        a, b = (jnp.einsum("rd,edf->ref", x, w) for w in (gate, up))
        y_RED = jnp.einsum("ref,efd->red", jax.nn.silu(a) * b, down)
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
        return jnp.take_along_axis(y_RED, jnp.minimum(expert, 2)[:, None, None], axis=1)[:, 0]

    ours = all_of(lambda *a: grouped_swiglu(*a, 1000, "cuda"), "bfloat16")
    with jax.default_matmul_precision("highest"):
        exact = all_of(every, "float32")
    for a, b in zip(ours, exact, strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


def test_with_an_older_jax_these_kernels_must_be_asked_for(h100, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert platform_kernels("auto", "gpu") == "xla"
    assert platform_kernels("cuda", "gpu") == "cuda"


def test_kernels_of_another_platform_are_refused(h100):
    assert platform_kernels("auto", "cpu") == platform_kernels("xla", "gpu") == "xla"
    assert platform_kernels("auto", "gpu") == platform_kernels("cuda", "gpu") == "cuda"
    for kernels, platform, home in (("cuda", "cpu", "GPU"), ("pallas", "gpu", "TPU")):
        with pytest.raises(ConfigError, match=f"made for a {home}, and this runs on a"):
            platform_kernels(kernels, platform)


@pytest.mark.parametrize(
    ("kind", "capability"), [("Tesla T4", "7.5"), ("AMD Instinct MI300X", "gfx942")]
)
def test_gpus_without_these_kernels_are_left_to_xla(h100, monkeypatch, kind, capability):
    monkeypatch.setattr(h100, "device_kind", kind)
    monkeypatch.setattr(h100, "compute_capability", capability)
    assert platform_kernels("auto", "gpu") == "xla"
    with pytest.raises(ConfigError, match=f"capability 8.0 or more, not {kind}; set it to 'auto'"):
        platform_kernels("cuda", "gpu")
