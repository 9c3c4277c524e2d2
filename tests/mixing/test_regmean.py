"""RegMean compared with least squares on the inputs themselves."""

import numpy as np
import pytest

from btx_jax.errors import UserError
from btx_jax.mixing.regmean import regmean, weighted_rows

IN, OUT = 12, 5


def layers(count=3, tokens=40, seed=0):
    """Weights, and inputs that differ between the models in scale and direction."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((IN, OUT)).astype(np.float32) for _ in range(count)]
    inputs = [rng.standard_normal((tokens, IN)) @ rng.standard_normal((IN, IN)) for _ in weights]
    return weights, inputs, [x.T @ x for x in inputs]


def test_with_alpha_1_it_is_the_least_squares_layer_of_all_inputs():
    weights, inputs, grams = layers()
    answers = np.concatenate([x @ w for x, w in zip(inputs, weights, strict=True)])
    expected = np.linalg.lstsq(np.concatenate(inputs), answers, rcond=None)[0]
    np.testing.assert_allclose(regmean(weights, grams, 1.0), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_alpha_is_what_is_left_off_the_diagonal(alpha):
    weights, _, grams = layers()
    left, right = np.zeros((IN, IN)), np.zeros((IN, OUT))
    for weight, gram in zip(weights, grams, strict=True):
        shrunk = gram * np.where(np.eye(IN) > 0, 1, alpha)
        left += shrunk
        right += shrunk @ weight
    expected = np.linalg.inv(left) @ right
    np.testing.assert_allclose(regmean(weights, grams, alpha), expected, rtol=1e-8, atol=1e-10)
    scaled = [gram * 1e6 for gram in grams]
    np.testing.assert_allclose(regmean(weights, scaled, alpha), expected, rtol=1e-8, atol=1e-10)


def test_equal_models_give_that_model_whatever_their_inputs():
    weights, _, grams = layers()
    merged = regmean([weights[0]] * 3, grams, 0.9)
    np.testing.assert_array_equal(merged, weights[0].astype(np.float64))


def test_few_tokens_suffice_below_alpha_1_and_are_told_at_1():
    weights, _, grams = layers(tokens=2)
    assert np.isfinite(regmean(weights, grams, 0.9)).all()
    with pytest.raises(
        UserError,
        match=r"does not determine how inputs of 12 numbers are merged with alpha=1; lower alpha",
    ):
        regmean(weights, grams, 1.0)


def test_inputs_that_are_always_zero_keep_the_mean():
    weights, _, grams = layers()
    for gram in grams:
        gram[3] = gram[:, 3] = 0
    merged = regmean(weights, grams, 0.9)
    np.testing.assert_array_equal(merged[3], np.mean(np.float64(weights), 0)[3])
    others = np.delete(np.arange(IN), 3)
    parts = [weight[others] for weight in weights], [gram[np.ix_(others, others)] for gram in grams]
    np.testing.assert_allclose(merged[others], regmean(*parts, 0.9), rtol=1e-9)


def test_the_size_of_inputs_does_not_matter():
    """A feature a million times larger than another has proportionally smaller weights."""
    weights, _, grams = layers()
    size = np.logspace(-6, 6, IN)
    sized = (
        [weight / size[:, None] for weight in weights],
        [g * np.outer(size, size) for g in grams],
    )
    expected = regmean(weights, grams, 0.9) / size[:, None]
    np.testing.assert_allclose(regmean(*sized, 0.9), expected, rtol=1e-9)


def test_rows_of_an_embedding_are_regmean_of_one_hot_inputs():
    rng = np.random.default_rng(1)
    tables = [rng.standard_normal((IN, OUT)).astype(np.float32) for _ in range(3)]
    counts = [rng.integers(1, 9, IN) for _ in tables]
    counts[1][4] = 0
    grams = [np.diag(count.astype(np.float64)) for count in counts]
    np.testing.assert_allclose(weighted_rows(tables, counts), regmean(tables, grams, 1.0))
    for count in counts:
        count[7] = 0
    unseen = np.mean([table[7].astype(np.float64) for table in tables], axis=0)
    np.testing.assert_allclose(weighted_rows(tables, counts)[7], unseen)
    np.testing.assert_array_equal(weighted_rows([tables[0]] * 3, counts), tables[0])
