"""Measures of continual learning: overall performance, performance drop, backward transfer (MoLA,
section 4.4)."""

from collections.abc import Sequence

import numpy as np

from btx_jax.errors import UserError


def measures(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Continual-learning measures of scores [t, t]: row k contains, after training through task k,
    the score on each task, in the order of training.

    overall_performance: mean of the last row. performance_drop: 2 / (t (t - 1)) times the sum over
    k >= 2 and i < k of R[k, i] - R[k-1, i]. backward_transfer: mean over i < t of R[t, i] - R[i,
    i]; performance_drop is 2 / t times as much. Negative values mean forgetting. Raises UserError
    for fewer than two tasks or a matrix that is not square.
    """
    r = np.array(scores, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) < 2:
        raise UserError(
            "scores of tasks learnt in turn must be a square matrix with two or more rows, not"
            f" {r.shape}"
        )
    t = len(r)
    drops = [r[k, i] - r[k - 1, i] for k in range(1, t) for i in range(k)]
    return {
        "overall_performance": float(r[-1].mean()),
        "performance_drop": float(2 / (t * (t - 1)) * np.sum(drops)),
        "backward_transfer": float(np.mean([r[-1, i] - r[i, i] for i in range(t - 1)])),
    }
