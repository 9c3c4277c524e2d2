import numpy as np
import pytest

from btx_jax.evaluation.btm import (
    DECAY,
    DomainProfiles,
    bayes_weights,
    ensemble_nll,
    tf_idf_weights,
)


def test_weights_are_a_distribution_and_favour_the_contexts_domain():
    rng = np.random.default_rng(0)
    ranges = {"math": (0, 40), "code": (30, 70), "world": (60, 100)}
    draw = lambda low, high: rng.integers(low, high, 50).tolist()  # noqa: E731
    profiles = DomainProfiles({name: [draw(*r) for _ in range(20)] for name, r in ranges.items()})
    contexts = [draw(*r) for r in ranges.values()] + [[500, 501], draw(0, 100)]
    for top in (1, 2, 3):
        weights = profiles.weights(contexts, top)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert ((weights > 0).sum(axis=1) <= top)[[0, 1, 2, 4]].all()
        np.testing.assert_allclose(weights[3], 1 / 3, err_msg="a context that no expert knows")
        assert weights[:3].argmax(axis=1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="top=4: there are 3 experts"):
        profiles.weights(contexts, 4)


def packed():
    """Two rows: documents of 70 and 30 tokens, then one of 60 and padding."""
    rng = np.random.default_rng(1)
    segments = np.array([[1] * 70 + [2] * 31, [1] * 60 + [0] * 41])
    return rng.integers(0, 100, segments.shape), segments


def test_tf_idf_weights_see_only_what_came_before_in_the_same_document():
    tokens, segments = packed()
    profiles = DomainProfiles({"low": [list(range(50))], "high": [list(range(50, 100))]})
    weights = tf_idf_weights(profiles, tokens, segments, 1)
    assert weights.shape == (2, 2, 100)
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_allclose(
        weights[:, 0, :32], 0.5, err_msg="the first block of a document has no context"
    )
    np.testing.assert_allclose(
        weights[:, 0, 70:100], 0.5, err_msg="a document does not see the one before it"
    )
    context = tokens[0, :33]
    assert weights[0, 0, 40] == (1 if (context < 50).sum() > (context >= 50).sum() else 0)
    for word in (
        0,
        99,
    ):  # each expert's own tokens, starting after those that block 32 .. 63 may use
        later = tokens.copy()
        later[0, 33:] = word
        np.testing.assert_array_equal(
            tf_idf_weights(profiles, later, segments, 1)[:, 0, :64], weights[:, 0, :64]
        )


def test_the_posterior_follows_the_better_expert_and_starts_anew_with_each_document():
    _, segments = packed()
    nll = np.ones((2, 2, 100))
    nll[0] = 0.5  # always the better expert
    weights = bayes_weights(nll, segments, updating=False)
    np.testing.assert_allclose(weights[:, 0, 0], 0.5)
    np.testing.assert_allclose(weights[0, 0, 1], np.exp(0.5) / (1 + np.exp(0.5)))
    assert weights[0, 0, 60] > 0.99
    np.testing.assert_allclose(
        weights[:, 0, 70], 0.5, err_msg="a uniform prior forgets the document before"
    )
    updated = bayes_weights(nll, segments, updating=True)
    assert updated[0, 0, 70] == pytest.approx(DECAY * 0.5 + (1 - DECAY), abs=1e-4)


def test_an_ensemble_mixes_probabilities_and_one_expert_alone_is_itself():
    rng = np.random.default_rng(2)
    nll = rng.exponential(size=(3, 2, 5))
    alone = np.zeros((3, 2, 5))
    alone[1] = 1
    np.testing.assert_allclose(ensemble_nll(nll, alone), nll[1])
    weights = rng.dirichlet([1, 1, 1], (2, 5)).transpose(2, 0, 1)
    np.testing.assert_allclose(np.exp(-ensemble_nll(nll, weights)), (weights * np.exp(-nll)).sum(0))
    assert (ensemble_nll(nll, weights) <= nll.max(0) + 1e-12).all()
