"""The summary of a pipeline: one dictionary, one table, made from what its stages left on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from btx_jax.reporting.metrics import FILE, read_metrics

LAST_STEPS = 20  # whose mean dropped fraction is reported


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def summarise(results: Mapping[str, Any], curves: Mapping[str, list[dict[str, Any]]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """results: of the evaluate stage. curves: run -> its metrics lines. seconds: stage -> wall time.

    routing.load is that of the mixture that trained longest, measured dropless on held-out text; dropped_fraction is the mean of
    the last steps of the last run that trained a mixture.
    """
    mixtures = [model for model in results["models"].values() if "routing" in model]
    best = max(mixtures, key=lambda model: model["tokens"])["routing"]["domains"] if mixtures else {}
    load = {domain: values["load"] for domain, values in best.items()}
    routed = [[line for line in lines if "routing" in line] for lines in curves.values()]
    dropped = next((mean(mean(line["routing"]["dropped"]) for line in lines[-LAST_STEPS:]) for lines in reversed(routed) if lines), 0.0)
    by_training = sorted(results["models"].items(), key=lambda item: item[1]["tokens"])  # the seed first, the mixture last
    shown = ("nats_per_token", "bits_per_byte", "tokens", "flops", "params_total", "params_active")
    return {
        "domains": results["domains"],
        "models": {name: {key: model[key] for key in shown} for name, model in by_training},
        "routing": {"load": load, "dropped_fraction": dropped},
        "wall_seconds": dict(seconds),
    }


def read_curves(runs: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every run that trained."""
    files = {name: Path(path) / FILE for name, path in runs.items()}
    return {name: read_metrics(file) for name, file in files.items() if file.exists()}


def table(summary: Mapping[str, Any]) -> Table:
    """Held-out nats per token, model by domain; the best of each column is bold."""
    domains = summary["domains"]
    made = Table(title="held-out loss, nats per token (lower is better)")
    for column in ("model", *domains, "mean", "tokens", "active"):
        made.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    rows = {name: [m["nats_per_token"][d] for d in domains] for name, m in summary["models"].items()}
    rows = {name: [*row, mean(row)] for name, row in rows.items()}
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        model = summary["models"][name]
        cells = [f"[bold]{x:.3f}[/bold]" if x == b else f"{x:.3f}" for x, b in zip(row, best, strict=True)]
        counts = (f"{model['tokens'] / 1e6:.2f}M", f"{model['params_active'] / 1e6:.2f}M")
        made.add_row(name, *cells, *counts)
    return made
