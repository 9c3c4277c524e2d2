"""The held-out loss to expect from training, by curves fitted to the study in docs/results.md.

Training lowers the seed's loss by a fraction that grows with the logarithm of the FLOPs spent:
scale * log(1 + x / reach), where x is the FLOPs expressed as tokens of the dense model, per
parameter of that model. Dense training and mixtures each have their own scale; they share the
reach. A mixture whose experts were trained apart gains less: its scale is multiplied by
1 - apart * share**2, where share is the fraction of the FLOPs spent on its branches (0 for sparse
upcycling). study.json holds the measurements (written by `python -m tools.curves`).
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
SIMILAR = 3.0  # up to this factor more or fewer parameters does not count as extrapolation
# Start and bounds of the fit: log(reach), scale of dense training, scale of mixtures, apart.
START, LEAST, MOST = (0.0, 0.05, 0.05, 0.1), (-5.0, 0.0, 0.0, -1.0), (5.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Spent:
    """FLOPs spent after the seed, expressed as tokens of the dense model. dense: in dense training
    or branches. mixture: in training a mixture."""

    dense: float
    mixture: float = 0.0

    @property
    def apart(self) -> float:
        """Fraction of a mixture's FLOPs spent on its branches; 0 for dense training."""
        return self.dense / (self.dense + self.mixture) if self.mixture else 0.0


@dataclass(frozen=True)
class Arm:
    """One arm of the study. gains: 1 - loss / the seed's loss, one per seed value; losses are means
    over domains."""

    name: str
    spent: Spent
    gains: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """The measurements of a study. parameters: of its dense model. seed_tokens: number of tokens
    that its seed was trained on."""

    parameters: int
    seed_tokens: int
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Expected:
    """Change of the held-out loss, as a fraction of the seed's, with its 95 % prediction interval.
    beyond: one clause for each quantity outside the range that the study measured; if there are
    any, the interval is too narrow."""

    change: float
    low: float
    high: float
    beyond: tuple[str, ...] = ()


@functools.cache
def study() -> Study:
    text = resources.files("btx_jax.planning").joinpath("study.json").read_text(encoding="utf-8")
    told = json.loads(text)
    arms = tuple(
        Arm(arm["name"], Spent(arm["dense"], arm["mixture"]), tuple(arm["gains"]))
        for arm in told["arms"]
    )
    return Study(told["parameters"], told["seed_tokens"], arms)


class Curves:
    """The curves that best fit a study's arms."""

    def __init__(self, measured: Study):
        self.measured = measured
        points = [(arm.spent, gain) for arm in measured.arms for gain in arm.gains]
        at = np.transpose([self._at(spent, measured.parameters) for spent, _ in points])
        gains = np.array([gain for _, gain in points])
        self.fitted, self.covariance = optimize.curve_fit(
            _gains, at, gains, START, bounds=(LEAST, MOST)
        )
        self.freedom = len(points) - len(START)
        left = gains - _gains(at, *self.fitted)
        self.variance = float(left @ left) / self.freedom

    @staticmethod
    def _at(spent: Spent, parameters: int) -> tuple[float, float, float]:
        """(FLOPs as tokens per parameter, 1 for a mixture or 0, its branches' share of them)."""
        x = (spent.dense + spent.mixture) / parameters
        return x, float(spent.mixture > 0), spent.apart

    def expected(self, spent: Spent, parameters: int, seed_tokens: int | None = None) -> Expected:
        """The change to expect from spending these FLOPs on a dense seed. parameters: of the seed.
        seed_tokens: number of tokens that it was trained on, None if unknown."""
        at = np.array(self._at(spent, parameters))
        gain = float(_gains(at, *self.fitted))
        gradient = optimize.approx_fprime(self.fitted, lambda fitted: float(_gains(at, *fitted)))
        spread = np.sqrt(self.variance + gradient @ self.covariance @ gradient)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom) * spread)
        beyond = self._beyond(spent, parameters, seed_tokens)
        return Expected(-gain, -gain - half, -gain + half, beyond)

    def _beyond(self, spent: Spent, parameters: int, seed_tokens: int | None) -> tuple[str, ...]:
        own, found = self.measured.parameters, []
        if not 1 / SIMILAR <= parameters / own <= SIMILAR:
            found.append(
                f"your model has {short(parameters)} parameters, the study's has {short(own)}"
            )
        seed, own_seed = seed_tokens, self.measured.seed_tokens / own
        if seed is not None and not 1 / SIMILAR <= seed / parameters / own_seed <= SIMILAR:
            found.append(
                f"your seed is trained on {seed / parameters:.2g} tokens per parameter, the"
                f" study's {own_seed:.2g}"
            )
        x, is_mixture, _ = self._at(spent, parameters)
        arms = (self._at(arm.spent, own) for arm in self.measured.arms)
        measured = [arm_x for arm_x, of_mixture, _ in arms if of_mixture == is_mixture]
        if not min(measured) <= x <= max(measured):
            kind = "a mixture" if is_mixture else "dense training"
            found.append(
                f"{kind} takes the FLOPs of {x:.2g} tokens per parameter, in the"
                f" study {min(measured):.2g} to {max(measured):.2g}"
            )
        return tuple(found)


def _gains(
    at: np.ndarray, log_reach: float, dense: float, mixture: float, apart: float
) -> np.ndarray:
    x, is_mixture, share = at
    scale = np.where(is_mixture > 0, mixture * (1 - apart * share**2), dense)
    return scale * np.log1p(x / np.exp(log_reach))


@functools.cache
def curves() -> Curves:
    return Curves(study())


def without(measured: Study, names: Sequence[str]) -> Study:
    """The study without the named arms, to see how well the others predict them."""
    left = tuple(arm for arm in measured.arms if arm.name not in names)
    return dataclasses.replace(measured, arms=left)


def short(count: float) -> str:
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g}{letter}"
    return f"{count:.0f}"
