import numpy as np
import pytest

from btx_jax.evaluation.btm import DomainProfiles


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
        assert ((weights > 0).sum(axis=1) <= top).all()
        assert weights[:3].argmax(axis=1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="top=4: there are 3 experts"):
        profiles.weights(contexts, 4)
