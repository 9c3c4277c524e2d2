"""Router rows by logistic regression of a token's domain on what the router sees of it."""

from collections.abc import Sequence

import numpy as np

MOST = 1000  # steps of L-BFGS


def logistic_rows(states: Sequence[np.ndarray]) -> np.ndarray:
    """Router rows [E, D], float64. states: of each of E domains, [tokens, D].

    The rows minimise the sum of a softmax's losses over all tokens, every domain with the same
    weight, and half the sum of their own squares. Unlike ridge regression's they have a meaningful
    length, so no temperature is needed; but they cannot be computed from sums.
    """
    # Slow to import, and of no use to all else here.
    from sklearn.linear_model import LogisticRegression

    experts, count = len(states), sum(map(len, states))
    x_MD = np.concatenate(states).astype(np.float64)
    if experts == 1:
        return np.zeros((1, x_MD.shape[1]))
    lengths = [len(state) for state in states]
    domain_M = np.repeat(np.arange(experts), lengths)
    weight_M = np.repeat([count / experts / length for length in lengths], lengths)
    # Of two domains one row is fitted, the difference of ours, whose squares are half of its own.
    half = experts == 2
    fitted = LogisticRegression(C=2.0 if half else 1.0, fit_intercept=False, max_iter=MOST)
    rows = fitted.fit(x_MD, domain_M, weight_M).coef_
    return np.concatenate([-rows, rows]) / 2 if half else rows
