"""Router rows by logistic regression: predict a token's domain from the router's input."""

from collections.abc import Sequence

import numpy as np

MOST = 1000  # maximum number of L-BFGS steps


def logistic_rows(states: Sequence[np.ndarray]) -> np.ndarray:
    """Router rows [E, D], float64. states: the router's inputs for each of E domains, [tokens, D].

    The rows minimise the cross-entropy summed over all tokens, with equal total weight per domain,
    plus half the sum of squared rows. Unlike those of ridge regression, the rows have a meaningful
    norm, so no temperature is needed; but they cannot be computed from sums.
    """
    # Imported here because it is slow and nothing else needs it.
    from sklearn.linear_model import LogisticRegression

    experts, count = len(states), sum(map(len, states))
    x_MD = np.concatenate(states).astype(np.float64)
    if experts == 1:
        return np.zeros((1, x_MD.shape[1]))
    lengths = [len(state) for state in states]
    domain_M = np.repeat(np.arange(experts), lengths)
    weight_M = np.repeat([count / experts / length for length in lengths], lengths)
    # For two domains scikit-learn fits a single row, the difference of our two. Its squared norm is
    # twice the sum of ours, so its penalty must count half.
    half = experts == 2
    fitted = LogisticRegression(C=2.0 if half else 1.0, fit_intercept=False, max_iter=MOST)
    rows = fitted.fit(x_MD, domain_M, weight_M).coef_
    return np.concatenate([-rows, rows]) / 2 if half else rows
