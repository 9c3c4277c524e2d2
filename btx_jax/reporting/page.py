"""The report page: one HTML file that needs no network. All text is escaped; only the figures, made here, are markup."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from btx_jax.reporting import plots
from btx_jax.reporting.summary import mean

PACKAGES = ("btx_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence: which model has the lowest mean over the domains, and what a mixture gained and forgot."""
    means = {name: mean(model["nats_per_token"].values()) for name, model in summary["models"].items()}
    best = min(means, key=means.__getitem__)
    others = sorted((value, name) for name, value in means.items() if name != best)
    if not others:
        return f"{best}: mean held-out loss {means[best]:.3f} nats per token."
    return f"{best} has the lowest mean held-out loss, {means[best]:.3f} nats per token; next is {others[0][1]} with {others[0][0]:.3f}."


def render(
    title: str,
    summary: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    experts: Sequence[str],
    configs: Mapping[str, str],
) -> str:
    """experts: names for the columns of the routing maps. configs: stage -> its config as text."""
    domains, load = summary["domains"], summary["routing"]["load"]
    values = {name: [model["nats_per_token"][d] for d in domains] for name, model in summary["models"].items()}
    values = {name: [*row, mean(row)] for name, row in values.items()}
    best = [min(column) for column in zip(*values.values(), strict=True)]
    rows = [
        {"name": name, "model": summary["models"][name], "cells": [{"value": v, "best": v == b} for v, b in zip(row, best, strict=True)]}
        for name, row in values.items()
    ]
    figures = {
        "matrix": plots.loss_matrix(summary),
        "curves": plots.loss_curves(curves),
        "routing": plots.routing_maps(load, experts) if load else "",
    }
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that is not installed
    environment = jinja2.Environment(loader=jinja2.PackageLoader("btx_jax.reporting", "."), autoescape=True)
    return environment.get_template("page.html.j2").render(
        title=title, verdict=verdict(summary), summary=summary, rows=rows, figures=figures, experts=experts, configs=configs,
        versions=versions, platform=platform.platform(),
    )  # fmt: skip
