"""Settings of routers that are solved from text, for recipes and the mix stage."""

from dataclasses import dataclass
from typing import Annotated

from btx_jax.config.schema import HUGE, Choice, Range, Section

# Names of these routers in recipes and configs.
RIDGE, LOGISTIC = "ridge", "logistic"
SOLVED = (RIDGE, LOGISTIC)
WEIGHTS = ("equal", "share")


@dataclass(frozen=True)
class RidgeConfig(Section):
    """Router rows solved by ridge regression of a token's domain on the router's input (DUME, arXiv
    2603.29765)."""

    penalty: Annotated[float, Range(0, HUGE)] = 1e-2
    """Added to the diagonal of the sum of x x^T over all tokens; DUME's lambda, not scaled by the
    number of tokens."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.1
    """Temperature of softmax(logits / temperature) for router rows of norm 1. Rows are stored with
    norm 1 / temperature, so that other programs need not know it."""
    weights: Annotated[str, Choice(WEIGHTS)] = "equal"
    """Weight of each domain. equal: all domains count as if they had the mean number of tokens.
    share: domains count in proportion to their tokens."""
