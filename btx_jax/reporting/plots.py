"""Figures of a report, as SVG text to put into a page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "btx"})

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], window: int = 10) -> str:
    """Training loss of every run, running mean over `window` steps."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for name, lines in curves.items():
        points = [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line]
        if points:
            steps, losses = np.array(points).T
            width = min(window, len(losses))
            axes.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label=name, linewidth=1.3)
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def _heat_map(
    axes: Any, values: np.ndarray, shades: np.ndarray, rows: Sequence[str], columns: Sequence[str], form: str, top: float
) -> None:
    """values written into cells coloured by `shades`, from 0 (white) to top (dark blue)."""
    image = axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(shades[i, j]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color="white" if dark else "black")


def loss_matrix(summary: Mapping[str, Any]) -> str:
    """Held-out nats per token, model x domain; coloured by the distance from each domain's best."""
    models, domains = list(summary["models"]), summary["domains"]
    values = np.array([[summary["models"][m]["nats_per_token"][d] for d in domains] for m in models])
    figure, axes = plt.subplots(figsize=(1.3 * len(domains) + 1.6, 0.42 * len(models) + 0.8))
    above = values - values.min(axis=0)
    _heat_map(axes, values, above, models, domains, "{:.2f}", max(above.max(), 1e-9))
    return _svg(figure)


def routing_maps(load: Mapping[str, Sequence[Sequence[float]]], experts: Sequence[str]) -> str:
    """One map a domain: share of routed tokens, layer x expert."""
    figure, all_axes = plt.subplots(1, len(load), figsize=(2.6 * len(load), 0.4 * len(next(iter(load.values()))) + 1.2), squeeze=False)
    for axes, (domain, layers) in zip(all_axes[0], load.items(), strict=True):
        width = max(len(layer) for layer in layers)
        values = np.array([[*layer, *([np.nan] * (width - len(layer)))] for layer in layers])
        _heat_map(axes, values, values, [f"layer {i}" for i in range(len(layers))], experts[:width], "{:.0%}", top=1)
        axes.set_title(domain)
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    return _svg(figure)
