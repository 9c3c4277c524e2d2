"""The study's tables as one figure, SVG: barrier, gain kept without a finetune, Branch-Train-MiX
next to its peers, split of the compute. Bars are 95 % intervals over seed values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from btx_jax.presets.experiments import SHARES
from btx_jax.presets.study import BRANCHES, TOKENS
from btx_jax.reporting.compare import interval
from btx_jax.reporting.plots import EXPERT_COLOURS, to_svg
from btx_jax.reporting.study import PEERS, Models, barriers, kept, losses, paired

FLOOR = -1.0  # shares of the gain below this are drawn at this value
# (router, merge) -> label. Branches that do not train shared parameters have no merge but the mean.
# Router "told" is the oracle: each domain is sent to its own expert.
WAYS = {
    ("normal", "mean"): "random routers, mean",
    ("ridge", "mean"): "ridge, mean",
    ("ridge", "regmean"): "ridge, regmean",
    ("logistic", "regmean"): "logistic, regmean",
    ("logistic", "mean"): "logistic, mean",
    ("told", "regmean"): "oracle, regmean",
    ("told", "mean"): "oracle, mean",
}


def figure(seeds: Sequence[Models]) -> str:
    drawn, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(10, 7.5))
    _barrier(first, seeds)
    _kept(second, seeds)
    _peers(third, seeds)
    _split(fourth, seeds)
    drawn.tight_layout()
    return to_svg(drawn)


def _errors(values: Sequence[float]) -> tuple[float, float]:
    mean, half = interval(values)
    return mean, half if np.isfinite(half) else 0.0


def _barrier(axes: Any, seeds: Sequence[Models]) -> None:
    for kind, by_step in barriers(seeds).items():
        x = [step * TOKENS / 1e6 for step in by_step]
        mean, half = zip(*map(_errors, by_step.values()), strict=True)
        label = f"{BRANCHES[kind].rate:g} x the seed's peak rate"
        axes.errorbar(x, mean, half, capsize=2, marker="o", markersize=3, label=label)
    axes.set(
        xlabel="tokens of a branch, millions", ylabel="barrier, nats per token", ylim=(0, None)
    )
    axes.set_title("What averaging costs")
    _legend(axes)


def _kept(axes: Any, seeds: Sequence[Models]) -> None:
    kinds = [kind for kind, branch in BRANCHES.items() if not branch.has_anchor]
    for number, ((router, merge), label) in enumerate(WAYS.items()):
        points = []
        for place, kind in enumerate(kinds):
            exact = BRANCHES[kind].is_exact
            if merge != "mean" and exact:
                continue
            start = f"oracle-{kind}" if router == "told" else f"untuned-{kind}-{router}"
            name = f"{start}-{merge}"
            shares = [
                float(np.mean(list(kept(m, name, kind).values()))) for m in seeds if name in m
            ]
            if shares:
                points.append((place + 0.08 * (number - 3), max(_errors(shares)[0], FLOOR)))
        if points:
            colour = EXPERT_COLOURS[number % len(EXPERT_COLOURS)]
            axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colour, label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel=f"share kept (below {FLOOR:g}: at the floor)", ylim=(FLOOR - 0.05, 1.05))
    axes.set_title("Experts' gain that the mixture keeps, not finetuned")
    _legend(axes, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _peers(axes: Any, seeds: Sequence[Models]) -> None:
    arms = {"btx": "routers at random", "btx_closed": "routers in closed form"}
    for number, (name, label) in enumerate(arms.items()):
        rows = {row: paired(seeds, name, peer) for row, peer in enumerate(PEERS)}
        points = [(*_errors(values), 0.2 * number - row) for row, values in rows.items() if values]
        if points:
            mean, half, place = zip(*points, strict=True)
            axes.errorbar(
                mean, place, xerr=half, fmt="o", markersize=3, capsize=2,
                color=EXPERT_COLOURS[number], label=label,
            )  # fmt: skip
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks([-row for row in range(len(PEERS))], PEERS)
    axes.set(xlabel="nats per token; to the left BTX is better")
    axes.set_title("BTX minus its peers, finetuned")
    _legend(axes)


def _legend(axes: Any, **options: Any) -> None:
    """Add a legend if anything is drawn; a partial study has a figure with empty axes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"fontsize": 8} | options)


def _split(axes: Any, seeds: Sequence[Models]) -> None:
    arms = {0: "upcycling_flops"} | {share: f"share_{share}" for share in SHARES if share < 100}
    found = {
        share: _errors(paired(seeds, arm, arms[0]))
        for share, arm in arms.items()
        if losses(seeds, arm)
    }
    if found:
        mean, half = zip(*found.values(), strict=True)
        axes.errorbar(list(found), mean, half, capsize=2, marker="o", markersize=3)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="share of the FLOPs in the branches, %", ylabel="loss minus that of upcycling")
    axes.set_title("The same FLOPs, split")
