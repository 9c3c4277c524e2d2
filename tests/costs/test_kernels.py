"""FLOPs of TPU kernels by formula."""

import pytest

from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.hlo import Shape
from btx_jax.costs.kernels import filled, kernel_flops
from btx_jax.costs.model import attention_flops
from btx_jax.costs.program import Kernel


@pytest.mark.parametrize(
    ("window", "tiles"),
    [(0, 10), (4096, 10), (1024, 7), (1025, 7), (1026, 9), (1, 4)],
    ids=str,
)
def test_splash_computes_the_tiles_that_a_window_touches(window, tiles):
    """Among the 4 x 4 tiles of 1024 at or below the diagonal."""
    q = Shape("bf16", (2, 8, 4096, 128))
    kernel = Kernel("splash_mha_fwd_residuals", (q, q, q), (q,), 3)
    one_tile = 2 * 2 * (2 * 8 * 128) * 1024 * 1024
    assert kernel_flops(kernel, window) == pytest.approx(3 * tiles * one_tile)


def test_splash_of_a_part_of_rows_computes_its_share():
    """Of 16 x 16 tiles at or below the diagonal, 136, two devices compute 68 each."""
    seen = Shape("s8", (1, 8, 16))
    q, k = Shape("bf16", (32, 8192, 128)), Shape("bf16", (8, 16384, 128))
    kernel = Kernel("splash_mha_fwd_residuals", (seen, seen, q, k, k), (q,), 1)
    assert kernel_flops(kernel) == pytest.approx(68 * 2 * 2 * (32 * 128) * 1024 * 1024)


def test_a_window_bounds_what_attention_costs():
    model = ModelConfig(61, 2, 32, 48, 4, 2, 8)
    windowed = ModelConfig(61, 2, 32, 48, 4, 2, 8, window=64)
    whole, part = (attention_flops(m, 4096, 512) for m in (model, windowed))
    pairs = sum(min(t + 1, 64) for t in range(512)) / sum(t + 1 for t in range(512))
    assert part / whole == pytest.approx(pairs, rel=0.01)
    assert attention_flops(windowed, 4096, 64) == attention_flops(model, 4096, 64)


def test_heads_narrower_than_the_matrix_unit_fill_it_in_part():
    q = Shape("bf16", (8, 4096, 128))
    splash, grouped = (Kernel(name, (q, q, q), (q,), 1) for name in ("splash_mha_dq", "gmm"))
    assert [filled(splash, array) for array in (128, 256)] == [1, 0.5]
    assert filled(grouped, 256) == 1
