"""Closed-form merging of shared parameters (RegMean, arXiv 2212.09849). Pure numpy.

A merged linear layer reproduces, in the least-squares sense, each model's outputs on that model's
inputs. For an embedding, whose inputs are one-hot, this is a mean of rows weighted by token counts.
"""

from collections.abc import Sequence

import numpy as np

from btx_jax.errors import UserError
from btx_jax.mixing.ridge import solve_positive


def regmean(weights: Sequence[np.ndarray], grams: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """The merged layer [in, out], float64: (sum of G')^-1 (sum of G' W), with G' = alpha G + (1 -
    alpha) diag(G).

    weights: W of each model, [in, out]. grams: G of each model, the sum of x x^T over its layer's
    inputs, [in, in]; a common factor does not matter. Equal models give that model. Raises
    UserError where the inputs do not determine the layer.
    """
    mean = np.stack(weights).mean(axis=0, dtype=np.float64)
    left, right = np.zeros((len(mean), len(mean))), np.zeros(mean.shape)
    for weight, gram in zip(weights, grams, strict=True):
        shrunk = alpha * gram
        np.fill_diagonal(shrunk, gram.diagonal())
        left += shrunk
        right += shrunk @ (weight - mean)  # contributes nothing when all models are equal
    # Normalise by input size, so that small inputs do not look rank-deficient. Inputs that are 0 in
    # all models keep the mean.
    size = np.sqrt(left.diagonal())
    size[size == 0] = 1
    left /= np.outer(size, size)
    np.fill_diagonal(left, 1)
    added = solve_positive(left, right / size[:, None])
    if added is None:
        raise UserError(
            f"the text does not determine how inputs of {len(mean)} numbers are merged with"
            f" alpha={alpha:g}; lower alpha, or give more text"
        )
    return mean + added / size[:, None]


def weighted_rows(tables: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> np.ndarray:
    """The merged embedding [tokens, D], float64: each row is the mean of the models' rows, weighted
    by how often each model's text contains the token, or unweighted where none does.

    tables: the embedding of each model, [tokens, D]. counts: for each model, [tokens].
    """
    count_NV = np.stack(counts).astype(np.float64)
    count_NV[:, count_NV.sum(0) == 0] = 1
    share_NV = count_NV / count_NV.sum(0)
    rows = tables[0].astype(np.float64)
    return rows + sum(
        share_V[:, None] * (table - rows)
        for share_V, table in zip(share_NV[1:], tables[1:], strict=True)
    )
