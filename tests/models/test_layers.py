import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.models.grouped import grouped_swiglu
from btx_jax.models.layers import Transposed, joint_swiglu, matmul, on_mesh, scaled_swiglu, swiglu
from btx_jax.parallel.sharding import make_mesh

ROUNDING = 2.0**-8  # of bfloat16


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transposed_kernel_gives_the_same_product(rows, dtype):
    keys = jax.random.split(jax.random.key(rows))
    x, w = (
        jax.random.normal(keys[0], (rows, 24)).astype(dtype),
        jax.random.normal(keys[1], (24, 10)).astype(dtype),
    )
    want = np.float64(x) @ np.float64(w)
    for kernel in (w, Transposed.of(w)):
        got = jax.jit(matmul)(x, kernel)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.float64(got), want, rtol=ROUNDING if dtype == "bfloat16" else 1e-5, atol=1e-5
        )
        wide = jax.jit(lambda x, kernel: matmul(x, kernel, jnp.float32))(x, kernel)
        assert wide.dtype == jnp.float32
        np.testing.assert_allclose(wide, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "held", [lambda kernel: kernel, Transposed.of], ids=["usual", "transposed"]
)
def test_joint_swiglu_in_bfloat16(rows, held):
    x, gate, up, down = (
        jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
        for i, shape in enumerate([(rows, 8), (8, 16), (8, 16), (16, 8)])
    )
    exact = [np.float64(a) for a in (x, gate, up, down)]
    a = exact[0] @ exact[1]
    want = (a / (1 + np.exp(-a)) * (exact[0] @ exact[2])) @ exact[3]
    got = joint_swiglu(x, held(jnp.concatenate([gate, up], axis=1)), held(down))
    np.testing.assert_allclose(np.float64(got), want, atol=2 * ROUNDING * np.abs(want).max())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_written_derivative_of_a_gated_block_is_autodiffs(activation):
    x, scale, *weights = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(6, 8), (6,), (8, 16), (8, 16), (16, 8)])
    )
    act = {"silu": jax.nn.silu, "gelu_tanh": lambda a: jax.nn.gelu(a, approximate=True)}[activation]

    def plain(x, scale, gate, up, down):
        return jnp.sin(scale[:, None] * ((act(x @ gate) * (x @ up)) @ down)).sum()

    def fast(x, scale, *weights):
        return jnp.sin(scaled_swiglu(x, scale, *weights, activation)).sum()

    want = jax.value_and_grad(plain, argnums=range(5))(x, scale, *weights)
    got = jax.value_and_grad(fast, argnums=range(5))(x, scale, *weights)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kernels", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("sizes", [[40, 0, 100, 7], [5, 256, 0, 140], [1, 1, 1, 1]])
def test_separate_experts_answer_as_stacked_ones(sizes, kernels, activation):
    """Rows that form one block, several whole blocks, and partial ones; some experts have none."""
    rows = sum(sizes)
    x, *weights = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(rows, 128), *[(4, 128, 128)] * 3])
    )
    expert = np.repeat(np.arange(4), sizes)
    want = np.stack(
        [swiglu(x[r : r + 1], *(w[expert[r]] for w in weights), activation)[0] for r in range(rows)]
    )
    joint = tuple(
        (jnp.concatenate([gate, up], axis=1), down) for gate, up, down in zip(*weights, strict=True)
    )
    held = tuple((Transposed.of(gate_up), Transposed.of(down)) for gate_up, down in joint)
    for given in (tuple(weights), joint, held):
        got = jax.jit(
            lambda x, given: grouped_swiglu(x, jnp.array(sizes), given, rows, kernels, activation)
        )(x, given)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


def test_on_a_mesh_float32_is_multiplied_exactly_and_nothing_is_left_behind():
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    for dtype, precision in (("float32", "highest"), ("bfloat16", None)):
        with on_mesh(mesh, dtype):
            assert jax.sharding.get_abstract_mesh().axis_names == mesh.axis_names
            assert jax.config.jax_default_matmul_precision == precision
    assert jax.sharding.get_abstract_mesh().empty
    assert jax.config.jax_default_matmul_precision is None
