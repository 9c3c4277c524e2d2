"""Router rows by ridge regression on sums over tokens (DUME, arXiv 2603.29765). Pure numpy.

For each domain, a layer needs the sum of x x^T, the sum of x, and the number of tokens, where x is
the router's input. Sums of several texts of one domain can be added. Each domain's sums are stored
separately, so that adding or dropping an expert needs no other expert's text.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from btx_jax.config.ridge import RidgeConfig
from btx_jax.errors import UserError


class Moments(NamedTuple):
    """Sums over the tokens of E domains in one layer. gram: of x x^T. total: of x. count: of
    tokens."""

    gram_EDD: np.ndarray  # float64
    total_ED: np.ndarray  # float64
    count_E: np.ndarray  # float64

    def without(self, expert: int) -> "Moments":
        return Moments(*(np.delete(part, expert, axis=0) for part in self))


def moments(states: Iterable[np.ndarray]) -> Moments:
    """The sums of one domain, in float64. states: router inputs of its tokens, in batches
    [tokens, D]."""
    gram_DD, total_D, count = np.zeros(()), np.zeros(()), 0
    for state in states:
        x_MD = state.astype(np.float64)
        gram_DD, total_D = gram_DD + x_MD.T @ x_MD, total_D + x_MD.sum(0)
        count += len(x_MD)
    return Moments(gram_DD[None], total_D[None], np.array([float(count)]))


def domain_weights(count_E: np.ndarray, weights: str) -> np.ndarray:
    """The weight of a token in each domain, [E]. With `equal`, all domains have the same total
    weight. Summed over all tokens, weights always equal the number of tokens."""
    return count_E.mean() / count_E if weights == "equal" else np.ones(len(count_E))


def solve(layer: Moments, ridge: RidgeConfig) -> np.ndarray:
    """Router rows [E, D], float64: the columns of (A + penalty I)^-1 [b_1 ... b_E], each divided by
    its norm and by the temperature. A is the sum of w_e gram_e, b_e is w_e total_e; w:
    `domain_weights`.

    DUME appends a constant 1 to x, which gives the logits a bias. Routers here have none, so the
    system is solved without it: dropping the bias from a solution with one would not be optimal.
    Raises UserError if there is no unique solution.
    """
    weight_E = domain_weights(layer.count_E, ridge.weights)
    a_DD = np.einsum("e,eij->ij", weight_E, layer.gram_EDD)
    a_DD[np.diag_indices_from(a_DD)] += ridge.penalty
    rows_DE = solve_positive(a_DD, (weight_E[:, None] * layer.total_ED).T)
    if rows_DE is None:
        raise UserError(
            f"{layer.count_E.sum():.0f} tokens do not determine its rows of {len(a_DD)} numbers"
            f" with ridge.penalty={ridge.penalty:g}; raise it, or give more text"
        )
    rows_ED = rows_DE.T
    length_E = np.linalg.norm(rows_ED, axis=1)
    if not length_E.all():
        raise UserError(
            f"the inputs from the text of expert {int(length_E.argmin())} sum to zero; give"
            " that expert different text"
        )
    return rows_ED / (length_E * ridge.temperature)[:, None]


def solve_positive(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """a^-1 b for symmetric a; None where a is not positive definite within float64 precision."""
    try:
        least = np.linalg.cholesky(a).diagonal().min() ** 2
    except np.linalg.LinAlgError:
        return None
    if least <= len(a) * np.finfo(np.float64).eps * a.diagonal().max():
        return None
    result = np.linalg.solve(a, b)
    return result if np.isfinite(result).all() else None


def own_share(states: Iterable[np.ndarray], rows_ED: np.ndarray, expert: int) -> float:
    """The share of tokens whose largest logit is this expert's; NaN if there are no tokens. states:
    router inputs in batches [tokens, D]."""
    hits = [(state @ rows_ED.T).argmax(-1) == expert for state in states]
    return float(np.concatenate(hits).mean()) if sum(map(len, hits)) else float("nan")
