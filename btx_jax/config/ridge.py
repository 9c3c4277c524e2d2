"""Routers in closed form: their settings, for recipes and for the mix stage alike."""

from dataclasses import dataclass
from typing import Annotated

from btx_jax.config.schema import HUGE, Choice, Range, Section

# In recipes and configs, for how routers start.
RIDGE, LOGISTIC = "ridge", "logistic"
SOLVED = (RIDGE, LOGISTIC)
WEIGHTS = ("equal", "share")


@dataclass(frozen=True)
class RidgeConfig(Section):
    """Router rows by ridge regression of a token's domain on what the router sees of it (DUME,
    arXiv 2603.29765).

    penalty: added to the diagonal of the sum of x x^T over all tokens; its lambda, not scaled by
    their number.
    temperature: of softmax(logits / temperature) for rows of length 1; rows have length
    1 / temperature, so that no other program needs to know of it.
    weights: how much each domain counts: `equal`, as if it had the mean number of tokens of all, or
    `share`, as many as it has.
    """

    penalty: Annotated[float, Range(0, HUGE)] = 1e-2
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.1
    weights: Annotated[str, Choice(WEIGHTS)] = "equal"
