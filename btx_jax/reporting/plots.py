"""Figures of a report, as SVG text to put into a page."""

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
        "text.parse_math": False,  # a `$` in a name is a dollar
    }
)

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from btx_jax.reporting.compare import mean_loss

CURVES = 12  # more runs than this in one figure cannot be told apart
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


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], window: int = 10) -> str:
    """Training loss of the runs, running mean over `window` steps; the first CURVES of them."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    drawn = {
        name: [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line]
        for name, lines in curves.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    for number, (name, points) in enumerate(list(drawn.items())[:CURVES]):
        steps, losses = np.array(points).T
        width = min(window, len(losses))
        style = ("-", "--")[number // 10 % 2]
        axes.plot(
            steps[width - 1 :],
            np.convolve(losses, np.ones(width) / width, "valid"),
            style,
            label=name,
            linewidth=1.3,
        )
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(fontsize=7, ncols=2)
    return _svg(figure)


def _heat_map(
    axes: Any,
    values: np.ndarray,
    shades: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str,
    top: float,
) -> None:
    """values written into cells coloured by `shades`, from 0 (white) to top (dark blue)."""
    image = axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
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
    """Held-out nats per token, model x domain; coloured by the distance from each domain's best."""
    models, domains = list(summary["models"]), summary["domains"]
    values = np.array(
        [[summary["models"][m]["nats_per_token"][d] for d in domains] for m in models]
    )
    figure, axes = plt.subplots(figsize=(1.3 * len(domains) + 1.6, 0.3 * len(models) + 0.8))
    above = values - values.min(axis=0)
    _heat_map(axes, values, above, models, domains, "{:.2f}", max(above.max(), 1e-9))
    return _svg(figure)


def loss_against_compute(models: Mapping[str, Any]) -> str:
    """Mean held-out loss over the training FLOPs behind each model: the paper's first figure, with
    loss for score. Models of unknown costs have no place in it."""
    figure, axes = plt.subplots(figsize=(7, 4))
    points = sorted(
        (model["flops"], mean_loss(model), name)
        for name, model in models.items()
        if model["flops"] is not None
    )
    axes.scatter(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        s=18,
        color=EXPERT_COLOURS[0],
        zorder=2,
    )
    for number, (x, y, name) in enumerate(points):
        axes.annotate(
            name, (x, y), xytext=(4, (3, -9)[number % 2]), textcoords="offset points", fontsize=7
        )
    axes.set(xlabel="training FLOPs behind the seed", ylabel="held-out loss, mean over domains")
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)
    return _svg(figure)


def arms(comparison: Mapping[str, Any]) -> str:
    """Mean loss of every arm with its 95 % interval over seeds; every seed a dot."""
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
    axes.set_yticks(range(len(entries)), [name for name, _ in entries])
    axes.set(xlabel="held-out loss, mean over domains, nats per token")
    axes.grid(alpha=0.3, axis="x")
    return _svg(figure)


def routing_maps(load: Mapping[str, Sequence[Sequence[float]]], experts: Sequence[str]) -> str:
    """One map a domain: share of routed tokens, layer x expert."""
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
        axes.set_title(domain)
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    return _svg(figure)


def lora_maps(found: Mapping[str, Any]) -> str:
    """Of LoRA experts: mean cosine between those of a layer, map by layer, and how many it has."""
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
    _heat_map(axes, values, np.abs(np.nan_to_num(values)), targets, columns, "{:.2f}", top=1)
    axes.set_xlabel("layer (experts)")
    return _svg(figure)


def redundancy_maps(layers: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> str:
    """One map a layer: cosine between the experts' deviations from their mean."""
    figure, all_axes = plt.subplots(1, len(layers), figsize=(2.3 * len(layers), 2.4), squeeze=False)
    for number, (axes, layer) in enumerate(zip(all_axes[0], layers, strict=True)):
        values = np.array(layer["deviation_cosine"])
        _heat_map(axes, values, np.abs(values), experts, experts, "{:.2f}", top=1)
        axes.set_title(f"layer {number}")
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    return _svg(figure)
