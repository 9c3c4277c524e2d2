"""Router rows by logistic regression."""

import numpy as np
import pytest
from scipy.optimize import minimize

from btx_jax.mixing.logistic import logistic_rows


def domains(experts, width=6, seed=0):
    """Overlapping clusters; later ones have more tokens."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(experts, width))
    return [
        (centre + rng.normal(size=(40 * (n + 1), width))).astype(np.float32)
        for n, centre in enumerate(centres)
    ]


def objective(rows, states):
    """The objective in the docstring: (value, gradient)."""
    count, total, gradient = sum(map(len, states)), 0.0, rows.copy()
    for number, state in enumerate(states):
        x, weight = state.astype(np.float64), count / len(states) / len(state)
        logits = x @ rows.T
        shifted = logits - logits.max(1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        total -= weight * np.log(p[:, number]).sum()
        p[:, number] -= 1
        gradient += weight * p.T @ x
    return total + (rows * rows).sum() / 2, gradient


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_rows_minimise_what_they_should(experts):
    states = domains(experts)
    rows = logistic_rows(states)
    shape = (experts, 6)

    def flat(values):
        value, gradient = objective(values.reshape(shape), states)
        return value, gradient.ravel()

    best = minimize(flat, np.zeros(experts * 6), jac=True, method="L-BFGS-B", tol=1e-12)
    np.testing.assert_allclose(rows, best.x.reshape(shape), atol=2e-3)
    assert objective(rows, states)[0] <= best.fun * (1 + 1e-6)


def test_how_much_text_a_domain_has_does_not_matter():
    """Except for the weight of tokens relative to that of squares, which is small here."""
    states = [np.concatenate([state] * 50) for state in domains(3)]
    one = logistic_rows(states)
    other = logistic_rows([states[0], np.concatenate([states[1]] * 5), states[2]])
    np.testing.assert_allclose(one, other, atol=0.01)
    assert abs(one).max() > 0.5


def test_one_expert_has_one_row():
    assert logistic_rows(domains(1)).shape == (1, 6)
