"""Comparison of arms: paired differences over seeds with confidence intervals, and verdicts on the
paper's claims."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from btx_jax.presets.experiments import CLAIMS, LORA_CLAIMS

CONFIDENCE = 0.95
SAME = 0.02  # nats per token: two arms are equal if the interval is inside +-SAME


def mean_loss(model: Mapping[str, Any]) -> float:
    """A model's mean loss over its domains, weighted equally."""
    return float(np.mean(list(model["nats_per_token"].values())))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % confidence interval by Student's t); the half width is infinite
    for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    half = (
        stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        * np.std(values, ddof=1)
        / math.sqrt(len(values))
    )
    return mean, float(half)


def compare(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare arms over seeds. seeds: the models of one results.json per seed. Returns {seeds,
    arms, claims}, all of it JSON.

    arms: name -> {mean, half_width, losses: one per seed}, for every arm that some seed has.
    claims: those of `experiments` whose arms exist, with the paired difference (left minus right,
    nats per token; negative favours the left) and a verdict.
    """
    names = list(dict.fromkeys(name for models in seeds for name in models))
    arms = {}
    for name in names:
        losses = [mean_loss(models[name]) for models in seeds if name in models]
        arms[name] = _entry(losses) | {"losses": losses}
    claims = []
    for said, sign, left, right, domain in CLAIMS + LORA_CLAIMS:
        losses = [
            (
                models[left]["nats_per_token"][domain] - models[right]["nats_per_token"][domain]
                if domain
                else mean_loss(models[left]) - mean_loss(models[right])
            )
            for models in seeds
            if left in models
            and right in models
            and (not domain or domain in models[left]["nats_per_token"])
        ]
        if losses:
            entry = _entry(losses)
            found = verdict(
                sign,
                entry["mean"],
                math.inf if entry["half_width"] is None else entry["half_width"],
            )
            claims.append(
                {
                    "claim": said,
                    "sign": sign,
                    "left": left,
                    "right": right,
                    "on": domain or "mean",
                    **entry,
                    "verdict": found,
                }
            )
    return {"seeds": len(seeds), "arms": arms, "claims": claims}


def _entry(values: Sequence[float]) -> dict[str, Any]:
    mean, half = interval(values)
    return {"mean": mean, "half_width": half if math.isfinite(half) else None, "count": len(values)}


def verdict(sign: str, mean: float, half: float) -> str:
    """Verdict on a claim: held, not held, or undecided when the interval permits both. sign `<`:
    left should have the lower loss; `=`: they should be equal, within SAME."""
    if sign == "=":
        if abs(mean) + half <= SAME:
            return "held"
        return "not held" if abs(mean) - half > SAME else "undecided"
    if mean + half < 0:
        return "held"
    return "not held" if mean - half > 0 else "undecided"


def markdown(comparison: Mapping[str, Any], costs: Mapping[str, Mapping[str, float]]) -> str:
    """The tables of a comparison. costs: of each arm, as in the summary."""

    def number(entry: Mapping[str, Any], form: str) -> str:
        half = "one seed" if entry["half_width"] is None else f"± {entry['half_width']:.3f}"
        return f"{entry['mean']:{form}} {half}"

    lines = [
        "| arm | held-out loss, mean over domains | seeds | tokens | FLOPs | chip-seconds |"
        " critical seconds | peak MiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    cell = lambda text: text.replace("|", r"\|")  # noqa: E731
    for name, arm in sorted(comparison["arms"].items(), key=lambda item: item[1]["mean"]):
        cost = costs.get(name, {})
        shown = (
            ("tokens", "{:,.0f}k", 1e3),
            ("flops", "{:.2e}", 1),
            ("chip_seconds", "{:.0f}", 1),
            ("critical_seconds", "{:.0f}", 1),
            ("peak_bytes", "{:.0f}", 2**20),
        )
        cells = [
            "unknown" if cost[key] is None else form.format(cost[key] / unit)
            for key, form, unit in shown
        ]
        lines.append(
            f"| {cell(name)} | {number(arm, '.3f')} | {arm['count']} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "| the paper says | left - right, nats per token | seeds | verdict |",
        "|---|---|---|---|",
    ]
    for claim in comparison["claims"]:
        what = f"{claim['claim']} ({claim['left']} {claim['sign']} {claim['right']}, {claim['on']})"
        lines.append(
            f"| {what} | {number(claim, '+.3f')} | {claim['count']} | {claim['verdict']} |"
        )
    return "\n".join(lines) + "\n"
