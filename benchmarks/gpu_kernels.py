"""Kernels for NVIDIA's Hopper GPUs, on one: their errors against float32, and their speed.

    pip install -e '.[cuda]' && python benchmarks/gpu_kernels.py

Errors are norms of the difference divided by norms of the float32 result, forward and for each
gradient. Attention sees packed documents. Experts get uneven shares of the rows, or none.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.models import hopper
from btx_jax.models.attention import attend
from btx_jax.models.cudnn import cudnn_attend
from btx_jax.models.grouped import grouped_swiglu

QUICKLY = {"xla_gpu_autotune_level": 0}  # for what is not timed


def error(ours: jax.Array, exact: jax.Array) -> float:
    a, b = (np.asarray(x, np.float32) for x in (ours, exact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def milliseconds(function, *arguments, calls: int = 10) -> float:
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = run(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def random(shape: tuple[int, ...], key: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, "bfloat16")


def value_and_gradients(function, dtype, probe, *arrays):
    """(value, gradients of its product with the probe)."""
    arrays = tuple(a.astype(dtype) for a in arrays)
    loss = lambda *a: (function(*a) * probe.astype(dtype)).astype("float32").sum()  # noqa: E731
    return function(*arrays), *jax.grad(loss, argnums=range(len(arrays)))(*arrays)


def compare(name: str, ours, exact, probe, *arrays) -> None:
    found = jax.jit(functools.partial(value_and_gradients, ours, "bfloat16"))(probe, *arrays)
    with jax.default_matmul_precision("highest"):
        twin = jax.jit(
            functools.partial(value_and_gradients, exact, "float32"), compiler_options=QUICKLY
        )(probe, *arrays)
    errors = " ".join(f"{error(a, b):.1e}" for a, b in zip(found, twin, strict=True))
    print(f"{name:52} errors {errors}", flush=True)


def attention(length: int, width: int, window: int, documents: float) -> None:
    """documents: probability that one begins at a token."""
    heads = [random((2, 2, 4, length, width), 0)]
    heads += [random((2, 2, length, width), key) for key in (1, 2)]
    begins = jax.random.bernoulli(jax.random.key(3), documents, (2, length))
    segments = jnp.cumsum(begins, axis=1) + 1
    ours, exact = (lambda *a, f=f: f(*a, segments, window) for f in (cudnn_attend, attend))
    name = f"attention, {length} tokens, heads of {width}, window {window}"
    compare(name, ours, exact, random(heads[0].shape, 4), *heads)


def experts(rows: int, width: int, hidden: int, sizes: tuple[int, ...]) -> None:
    """Rows behind the last expert's belong to none."""
    count, is_own = len(sizes), (jnp.arange(rows) < sum(sizes))[:, None]
    shapes = (count, width, hidden), (count, width, hidden), (count, hidden, width)
    weights = [random(shape, key) * shape[1] ** -0.5 for key, shape in enumerate(shapes)]
    of_row = np.minimum(np.searchsorted(np.cumsum(sizes), np.arange(rows), "right"), count - 1)

    def ours(x, *weights):
        y = grouped_swiglu(x, jnp.array(sizes, "int32"), weights, rows, "cuda")
        return jnp.where(is_own, y, 0)

    def every(x, gate, up, down):
        a, b = (jnp.einsum("rd,edf->ref", x, w) for w in (gate, up))
        y_RED = jnp.einsum("ref,efd->red", jax.nn.silu(a) * b, down)
        return jnp.where(is_own, y_RED[np.arange(rows), of_row], 0)

    # Gradients of rows of no expert are undefined, and nothing reads them: they get none here.
    own = lambda f: lambda x, *w: f(jnp.where(is_own, x, 0), *w)  # noqa: E731
    name = f"experts, {width} x {hidden}, {sizes} of {rows} rows"
    compare(
        name, own(ours), own(every), random((rows, width), 8), random((rows, width), 9), *weights
    )


def experts_speed() -> None:
    rows, width, hidden, count = 16_384, 2048, 8192, 4
    x, h = random((rows, width), 0), random((rows, hidden), 1)
    gate = random((count, width, hidden), 2)
    sizes = jnp.array([4423, 3768, 4259, 3934], "int32")
    transposed = functools.partial(hopper.multiply, is_transposed=True)
    for name, function, arguments in (
        ("one dense matmul", jnp.matmul, (x, gate[0])),
        ("into the experts, forward", hopper.multiply, (x, gate, sizes)),
        ("gradient of the rows", transposed, (h, gate, sizes)),
        ("gradient of the weights", hopper.kernel_gradient, (x, h, sizes)),
    ):
        took = milliseconds(function, *arguments)
        rate = 2 * rows * width * hidden / took / 1e9
        print(f"{name:52} {took:6.3f} ms {rate:5.0f} TFLOP/s", flush=True)


def attention_speed() -> None:
    """Forward and backward, of a layer of Llama 3.2 1B."""
    q, *kv = random((2, 8, 4, 4096, 64), 0), *(random((2, 8, 4096, 64), key) for key in (1, 2))
    segments, probe = jnp.ones((2, 4096), "int32"), random(q.shape, 3)

    def unmasked(q_BNGTK, k_BNSK, v_BNSK, *_):
        heads = q_BNGTK.reshape(2, 32, 4096, 64), k_BNSK, v_BNSK
        y_BTHK = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in heads), is_causal=True, implementation="cudnn"
        )
        return y_BTHK.swapaxes(1, 2).reshape(q_BNGTK.shape)

    for name, function in (
        (
            "attention, documents masked",
            lambda q, k, v, segments: cudnn_attend(q, k, v, segments, 0),
        ),
        ("attention, causal only", unmasked),
    ):

        def gradients(*heads_and_more, function=function):
            *heads, segments, probe = heads_and_more
            loss = lambda *a: (function(*a, segments) * probe).astype("float32").sum()  # noqa: E731
            return jax.grad(loss, argnums=(0, 1, 2))(*heads)

        took = milliseconds(gradients, q, *kv, segments, probe)
        print(f"{name:52} {took:6.3f} ms", flush=True)


def main() -> None:
    print(jax.devices()[0].device_kind)
    if not hopper.is_possible(random((128, 128), 0), random((1, 128, 128), 0)):
        raise SystemExit("not a Hopper GPU: it would be XLA that is measured here")
    attention(1024, 64, 0, 0.01)
    attention(1000, 128, 300, 0.01)
    experts(1000, 256, 384, (270, 180, 450))
    experts(1000, 256, 384, (0, 7, 0, 693))
    experts(200, 128, 128, (10, 0, 0, 0))
    experts_speed()
    attention_speed()


if __name__ == "__main__":
    main()
