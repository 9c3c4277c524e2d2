"""Merges of one tensor, each compared with a few lines of numpy in float64, and with results of
mergekit 0.1.5 (its merge_methods, float32)."""

import numpy as np
import pytest

from btx_jax.config.merges import MERGE_SETTINGS, READ_BASE
from btx_jax.config.schema import from_dict
from btx_jax.errors import ConfigError
from btx_jax.mixing.merge import MERGES, slerp, task_arithmetic, ulp
from btx_jax.mixing.recipe import Recipe

FLOAT32 = np.dtype(np.float32)
LARGE = (260, 257)  # more elements than are merged at a time


def models(dtype, count=3, shape=LARGE, seed=0):
    """base_model's tensor, and those of models trained from it."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    tensors = [base + 0.3 * rng.standard_normal(shape) for _ in range(count)]
    return base.astype(dtype), [tensor.astype(dtype) for tensor in tensors]


A, B = np.array([3, -1, 2, 0.5], np.float32), np.array([1, 2, -0.5, 4], np.float32)


@pytest.mark.parametrize(
    ("other", "theirs"),
    [
        (B, [3.0383029, -0.17673886, 1.6075208, 1.8798596]),
        (0.01 - A, [1.5025, -0.4975, 1.0025, 0.2525]),
        (0 * A, [2.7716386, -0.92387956, 1.8477591, 0.46193978]),
        (2 * A, [3.75, -1.25, 2.5, 0.625]),
    ],
    ids=("arc", "opposite", "zeros", "parallel"),
)
def test_slerp_is_that_of_mergekit(other, theirs):
    np.testing.assert_allclose(slerp([A, other], 0.25, FLOAT32), theirs, rtol=1e-6)


def test_task_arithmetic_is_that_of_mergekit():
    base = np.array([1, 0, -1, 2], np.float32)
    theirs = [1.8, 0.4, 0.4, 2.2]  # weights 1, lambda 0.4
    np.testing.assert_allclose(task_arithmetic(base, [A, B], 0.4, FLOAT32), theirs, rtol=1e-6)


def is_rounded(found, exact, dtype):
    bound = ulp(exact, dtype) / 2 * 1.001 + 1e-12 * np.abs(exact).max()
    return bool((np.abs(found.astype(np.float64) - exact) <= bound).all())


def slerp_twin(a, b, t):
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("dtype", [np.dtype(d) for d in ("float32", "bfloat16", "float16")])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_on_the_arc(dtype, t):
    _, (a, b) = models(dtype, 2)
    found = slerp([a, b], t, dtype)
    assert found.dtype == dtype and found.shape == LARGE
    exact = slerp_twin(a.astype(np.float64), b.astype(np.float64), t)
    assert is_rounded(found, exact, dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_of_nearly_parallel_tensors_is_a_straight_line(sign):
    _, (a,) = models(FLOAT32, 1)
    b = (sign * (3 * a.astype(np.float64) + 0.01)).astype(FLOAT32)
    exact = 0.75 * a.astype(np.float64) + 0.25 * b.astype(np.float64)
    assert is_rounded(slerp([a, b], 0.25, FLOAT32), exact, FLOAT32)


def test_slerp_of_a_tensor_with_itself_alone_or_of_zeros_has_the_same_bits():
    _, (a,) = models(FLOAT32, 1)
    for tensors in ([a, a], [a]):
        assert slerp(tensors, 0.3, FLOAT32).tobytes() == a.tobytes()
    zeros = np.zeros(5, FLOAT32)
    assert slerp([zeros, zeros], 0.3, FLOAT32).tobytes() == zeros.tobytes()


@pytest.mark.parametrize("dtype", [np.dtype(d) for d in ("float32", "bfloat16", "float16")])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, -0.5])
def test_task_arithmetic_adds_scaled_changes(dtype, scale):
    base, tensors = models(dtype)
    found = task_arithmetic(base, tensors, scale, dtype)
    assert found.dtype == dtype and found.shape == LARGE
    exact = base.astype(np.float64)
    exact = exact + scale * sum(tensor.astype(np.float64) - exact for tensor in tensors)
    assert is_rounded(found, exact, dtype)


def test_task_arithmetic_that_changes_nothing_keeps_the_bits():
    base, tensors = models(FLOAT32)
    assert task_arithmetic(base, tensors, 0.0, FLOAT32).tobytes() == base.tobytes()
    assert task_arithmetic(base, [base] * 3, 7.0, FLOAT32).tobytes() == base.tobytes()


def recipe(models="ab", **changes):
    experts = [{"source_model": name, "positive_prompts": ["a"]} for name in models]
    given = {"base_model": "a", "base": "average", "gate_mode": "normal", "experts": experts}
    return from_dict(Recipe, given | changes)


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_is_made_with_the_options_that_it_names(name):
    merge, made_by = MERGES[name], recipe(merge=name)
    settings = {key: getattr(made_by, key) for key in MERGE_SETTINGS[name]}
    base, tensors = models(FLOAT32, merge.models or 3, (4, 5))
    own = base if name in READ_BASE else None
    made = merge.make(own, tensors, FLOAT32, np.random.default_rng(0), **settings)
    assert made.shape == base.shape and made.dtype == FLOAT32


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"base": "copy"},
            "merge='slerp': only used with base: average; set that, or leave merge out",
        ),
        ({"models": "abc"}, "merge='slerp': merges exactly 2 models, but the experts come from 3"),
        ({"models": "aa"}, "merge='slerp': merges exactly 2 models, but the experts come from 1"),
        ({"t": 1.5}, "t=1.5: must lie in"),
        ({"merge": "mean", "t": 0.2}, "t=0.2: only used with merge slerp; remove it or set merge"),
        (
            {"merge": "ties", "scale": 2.0},
            "scale=2.0: only used with merge task_arithmetic; remove it or set merge",
        ),
        (
            {"density": 0.5},
            "density=0.5: only used with merge ties and dare; remove it or set merge",
        ),
        ({"merge": "slurp"}, "did you mean 'slerp'?"),
    ],
)
def test_options_of_another_merge_are_one_line_with_the_cure(changes, told):
    with pytest.raises(ConfigError) as caught:
        recipe(**{"merge": "slerp"} | changes)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_named_twice_is_one_of_two():
    assert recipe("aba", merge="slerp", t=0.25).t == 0.25
