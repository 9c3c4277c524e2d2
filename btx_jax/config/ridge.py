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
    """Router rows by ridge regression of a token's domain on the router's input (DUME, arXiv
    2603.29765)."""

    penalty: Annotated[float, Range(0, HUGE)] = 1e-2
    """Added to the diagonal of the sum of x x^T over all tokens; DUME's lambda, not scaled by the
    number of tokens."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.1
    """Of softmax(logits / temperature) for rows of length 1; rows are stored with length 1 /
    temperature, so that no other program needs to know of it."""
    weights: Annotated[str, Choice(WEIGHTS)] = "equal"
    """How much each domain counts. equal: as if it had the mean number of tokens of all. share: as
    many as it has."""
