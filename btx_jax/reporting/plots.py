"""Figures of a report, as SVG text to embed in a page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": "btx",
        "text.parse_math": False,  # names are shown literally
    }
)

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from btx_jax.reporting.compare import mean_loss
from btx_jax.reporting.summary import over_domains
from btx_jax.training.watch import BARRIER

WINDOW = 10  # steps in a running mean
LABEL = 24  # characters of a name in a figure; tables have it in full
CURVES = 12  # more runs than this in one figure would be indistinguishable
EXPERT_COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#b279a2",
    "#e45756",
    "#72b7b2",
    "#eeca3b",
    "#9d755d",
)


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same data; closes it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def short(name: str) -> str:
    """Beginning and end of a name that is too long for a figure."""
    return name if len(name) <= LABEL else f"{name[: LABEL // 2 - 1]}…{name[-LABEL // 2 :]}"


def running_mean(values: Sequence[float]) -> np.ndarray:
    """For each value, the mean of the WINDOW values up to it (fewer at the beginning)."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Running mean of the training loss of the first CURVES runs. "" when none trained."""
    drawn = {
        name: [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line]
        for name, lines in curves.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    smooth = {
        name: [*zip((s for s, _ in points), running_mean([x for _, x in points]), strict=True)]
        for name, points in drawn.items()
    }
    return _lines(smooth, "training loss, nats per token")


def heldout_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Held-out loss of the first CURVES runs, mean over domains. "" when none was evaluated."""
    drawn = {
        name: [(x["step"], over_domains(x["heldout"])) for x in lines if "heldout" in x]
        for name, lines in curves.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    return _lines(drawn, "held-out loss, nats per token") if drawn else ""


def _lines(drawn: Mapping[str, Sequence[tuple[int, float]]], what: str) -> str:
    """Plot name -> (step, value) as one line each; lines with few points have markers."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for number, (name, points) in enumerate(list(drawn.items())[:CURVES]):
        axes.plot(
            *zip(*points, strict=True),
            ("-", "--")[number // 10 % 2],
            marker="." if len(points) <= WINDOW else None,
            label=short(name),
            linewidth=1.3,
        )
    axes.set(xlabel="step", ylabel=what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return to_svg(figure)


def test_set_curves(found: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Plot run -> TASK/METRIC -> (step, value), the first CURVES lines. "" when there are none."""
    drawn = [
        (f"{run}: {metric}", points)
        for run, metrics in found.items()
        for metric, points in metrics.items()
    ]
    if not drawn:
        return ""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for number, (name, points) in enumerate(drawn[:CURVES]):
        style = ("-", "--")[number // 10 % 2]
        axes.plot(*zip(*points, strict=True), style, marker=".", label=short(name), linewidth=1.3)
    axes.set(xlabel="step", ylabel="share of items", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return to_svg(figure)


def mixing_probes(probes: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> str:
    """Plot branch -> (step, held-out loss, loss of its average with the seed, barrier): losses and
    barriers side by side, for the first CURVES branches. "" when none was probed."""
    if not probes:
        return ""
    figure, (losses, barriers) = plt.subplots(1, 2, figsize=(9, 3.4))
    for number, (name, points) in enumerate(list(probes.items())[:CURVES]):
        steps, own, mixed, height = zip(*points, strict=True)
        line = {"color": f"C{number % 10}", "marker": ".", "linewidth": 1.3}
        losses.plot(steps, own, "-", **line)
        losses.plot(steps, mixed, "--", **line)
        barriers.plot(steps, height, ("-", ":")[number // 10], label=short(name), **line)
    barriers.axhline(0, color="grey", linewidth=0.8)
    barriers.axhline(BARRIER, color="grey", linewidth=0.8, linestyle="--")
    kinds = [Line2D([], [], color="grey", linestyle=style) for style in ("-", "--")]
    losses.legend(kinds, ["branch", "averaged with the seed"], fontsize=7)
    barriers.legend(fontsize=7, ncols=2)
    losses.set(xlabel="step", ylabel="held-out loss, nats per token")
    barriers.set(xlabel="step", ylabel="barrier, nats per token")
    for axes in (losses, barriers):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return to_svg(figure)


def _heat_map(
    axes: Any,
    values: np.ndarray,
    shades: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str,
    top: float,
    signed: bool = False,
) -> None:
    """Write values into cells coloured by `shades`, from 0 (white) to top (dark blue); if signed,
    also to -top (dark red)."""
    scale = {"cmap": "RdBu", "vmin": -top} if signed else {"cmap": "Blues", "vmin": 0}
    image = axes.imshow(shades, aspect="auto", vmax=top, **scale)
    axes.set_xticks(range(len(columns)), [short(name) for name in columns])
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(shades[i, j]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(
            j,
            i,
            form.format(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )


def loss_matrix(summary: Mapping[str, Any]) -> str:
    """Held-out nats per token, model x domain, coloured by the distance from each domain's best."""
    models, domains = list(summary["models"]), summary["domains"]
    values = np.array(
        [[summary["models"][m]["nats_per_token"][d] for d in domains] for m in models]
    )
    figure, axes = plt.subplots(figsize=(1.3 * len(domains) + 1.6, 0.3 * len(models) + 0.8))
    above = values - values.min(axis=0)
    _heat_map(axes, values, above, models, domains, "{:.2f}", max(above.max(), 1e-9))
    return to_svg(figure)


def loss_against_compute(models: Mapping[str, Any], seed: str) -> str:
    """Mean held-out loss against the training FLOPs of each model: the paper's first figure, with
    loss in place of score. "" when FLOPs are unknown or all equal."""
    points = sorted(
        (model["flops"], mean_loss(model), name)
        for name, model in models.items()
        if model["flops"] is not None
    )
    if len({flops for flops, _, _ in points}) < 2:
        return ""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.scatter(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        s=18,
        color=EXPERT_COLOURS[0],
        zorder=2,
    )
    for number, (x, y, name) in enumerate(points):
        axes.annotate(
            short(name),
            (x, y),
            xytext=(4, (3, -9)[number % 2]),
            textcoords="offset points",
            fontsize=7,
        )
    behind = " after the seed" if seed else ""
    axes.set(xlabel=f"training FLOPs{behind}", ylabel="held-out loss, mean over domains")
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)
    return to_svg(figure)


def arms(comparison: Mapping[str, Any]) -> str:
    """Mean loss of every arm with its 95 % confidence interval over seeds; a dot for every seed."""
    entries = sorted(comparison["arms"].items(), key=lambda item: -item[1]["mean"])
    figure, axes = plt.subplots(figsize=(6.5, 0.24 * len(entries) + 0.9))
    for row, (_, arm) in enumerate(entries):
        axes.errorbar(
            arm["mean"],
            row,
            xerr=arm["half_width"] or 0,
            fmt="|",
            color=EXPERT_COLOURS[0],
            capsize=2,
        )
        axes.scatter(
            arm["losses"], [row] * len(arm["losses"]), s=8, color=EXPERT_COLOURS[1], zorder=3
        )
    axes.set_yticks(range(len(entries)), [short(name) for name, _ in entries])
    axes.set(xlabel="held-out loss, mean over domains, nats per token")
    axes.grid(alpha=0.3, axis="x")
    return to_svg(figure)


def routing_maps(load: Mapping[str, Sequence[Sequence[float]]], experts: Sequence[str]) -> str:
    """One map per domain: share of routed tokens, layer x expert."""
    figure, all_axes = plt.subplots(
        1,
        len(load),
        figsize=(2.6 * len(load), 0.4 * len(next(iter(load.values()))) + 1.2),
        squeeze=False,
    )
    for axes, (domain, layers) in zip(all_axes[0], load.items(), strict=True):
        values = np.array(layers, float)
        _heat_map(
            axes,
            values,
            np.nan_to_num(values),
            [f"layer {i}" for i in range(len(layers))],
            experts,
            "{:.0%}",
            top=1,
        )
        axes.set_title(short(domain))
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    return to_svg(figure)


def lora_maps(found: Mapping[str, Any]) -> str:
    """Mean cosine between a layer's LoRA experts, map x layer, and the number of experts."""
    targets, counts = list(found["redundancy"]), found["experts"]
    values = np.array(
        [
            [np.nan if x is None else x["cosine"] for x in found["redundancy"][target]]
            for target in targets
        ],
        float,
    )
    figure, axes = plt.subplots(
        figsize=(max(4.0, 0.42 * len(counts) + 1.2), 0.32 * len(targets) + 1.1)
    )
    columns = [f"{layer}\n({count})" for layer, count in enumerate(counts)]
    _heat_map(axes, values, np.nan_to_num(values), targets, columns, "{:.2f}", top=1, signed=True)
    axes.set_xlabel("layer (experts)")
    return to_svg(figure)


def redundancy_maps(layers: Mapping[int, Mapping[str, Any]], experts: Sequence[str]) -> str:
    """One map per layer, titled by its number: cosine between the experts' deviations from their
    mean."""
    figure, all_axes = plt.subplots(1, len(layers), figsize=(2.3 * len(layers), 2.4), squeeze=False)
    for axes, (number, layer) in zip(all_axes[0], layers.items(), strict=True):
        values = np.array(layer["deviation_cosine"])
        _heat_map(axes, values, values, experts, experts, "{:.2f}", top=1, signed=True)
        axes.set_title(f"layer {number}")
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    return to_svg(figure)
