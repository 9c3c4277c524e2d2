"""The report page: one HTML file that needs no network. All text is escaped; only the figures,
which are made here, are markup."""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from btx_jax.reporting import plots
from btx_jax.reporting.goodput import ACTIVITIES
from btx_jax.reporting.summary import amount, mean, scaled
from btx_jax.terminal import counted
from btx_jax.training.watch import BARRIER

PACKAGES = ("btx_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Maximum redundancy maps side by side. Of deeper models only every n-th layer is drawn; the table
# has all layers.
MOST_MAPS = 8


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence: which model has the lowest mean loss over domains, and what the mixture gained
    and forgot."""
    if not summary["domains"]:
        return f"{counted(len(summary['models']), 'model')} on test sets alone."
    means = {
        name: mean(model["nats_per_token"].values()) for name, model in summary["models"].items()
    }
    best = min(means, key=means.__getitem__)
    others = sorted((value, name) for name, value in means.items() if name != best)
    if not others:
        return f"{best}: mean held-out loss {means[best]:.3f} nats per token."
    told = (
        f"{best} has the lowest mean held-out loss, {means[best]:.3f} nats per token; next is"
        f" {others[0][1]} with {others[0][0]:.3f}."
    )
    gained = summary["gains"].get("models", {})
    if summary["shown"] in gained:
        own, general, seed = gained[summary["shown"]], summary["gains"]["general"], summary["seed"]
        experts = mean(gained[name]["forgetting"] for name in summary["experts"])
        told += (
            f" {summary['shown']} {_gains(mean(own['over_seed'].values()))} over {seed} on"
            f" average; on {general} it is {_apart(own['forgetting'])} {seed}, its experts"
            f" {_apart(experts)} it on average."
        )
    return told


def _gains(value: float) -> str:
    return f"gains {value:.3f}" if value >= 0 else f"loses {-value:.3f}"


def _apart(value: float) -> str:
    return f"{abs(value):.3f} {'above' if value > 0 else 'below'}"


def render(
    title: str,
    summary: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    experts: Sequence[str],
    provenance: Mapping[str, Mapping[str, str]],
) -> str:
    """Render the report as one HTML page. experts: names of the shown mixture's experts, if known.
    provenance: stage -> {config: text, sha256}."""
    domains = summary["domains"]
    values = {
        name: [model["nats_per_token"][d] for d in domains]
        for name, model in summary["models"].items()
        if domains
    }
    values = {name: [*row, mean(row)] for name, row in values.items()}
    best = [min(column) for column in zip(*values.values(), strict=True)]
    rows = [
        {
            "name": name,
            "model": summary["models"][name],
            "cells": [{"value": v, "best": v == b} for v, b in zip(row, best, strict=True)],
        }
        for name, row in values.items()
    ]
    routing = summary["routing"].get(summary["shown"])
    figures: dict[str, Any] = {
        "matrix": plots.loss_matrix(summary) if domains else "",
        "compute": (
            plots.loss_against_compute(summary["models"], summary["seed"]) if domains else ""
        ),
        "curves": plots.loss_curves(curves),
        "test_sets": plots.test_set_curves(summary["test_sets"]),
        "probes": plots.mixing_probes(summary["probes"]),
    }
    texts: dict[str, Any] = {}
    if routing:
        load = {domain: found["load"] for domain, found in routing["domains"].items()}
        width = len(next(iter(load.values()))[0])
        experts = experts if len(experts) == width else [f"expert {i}" for i in range(width)]
        figures["routing"] = plots.routing_maps(load, experts)
        every = -(-len(routing["redundancy"]) // MOST_MAPS)
        figures["redundancy"] = plots.redundancy_maps(
            dict(list(enumerate(routing["redundancy"]))[::every]), experts
        )
        texts = routing["texts"]
    figures["lora"] = {
        name: plots.lora_maps(found) for name, found in summary["lora"].items() if any_pair(found)
    }
    if summary["comparison"]:
        figures["arms"] = plots.arms(summary["comparison"])
    samples = _samples(summary["models"])
    shown = {f"sample {i}": one["explained"] for i, one in enumerate(samples) if one["explained"]}
    layers: list[int] = next((text["layers"] for text in (texts | shown).values()), [])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("btx_jax.reporting", "."), autoescape=True
    )
    choices = {
        name: {key: text[key] for key in ("experts", "gates")}
        for name, text in (texts | shown).items()
    }
    return environment.get_template("page.html.j2").render(
        title=title, verdict=verdict(summary), summary=summary, rows=rows, figures=figures,
        experts=experts, provenance=provenance, versions=_versions(), platform=platform.platform(),
        command=" ".join(sys.argv), routing=routing, texts=texts, colours=plots.EXPERT_COLOURS,
        choices=choices, layers=layers, samples=samples, as_script=_as_script, amount=amount,
        scaled=scaled, activities=ACTIVITIES, limit=BARRIER,
    )  # fmt: skip


def _samples(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every prompt and model: prompt ("" after its first model), model, text, explained (None
    for dense models)."""
    told = {name: model["samples"] for name, model in models.items() if "samples" in model}
    count = max(map(len, told.values()), default=0)
    return [
        {
            "prompt": all_of_it[i]["prompt"] if not number else "",
            "model": name,
            "text": all_of_it[i]["text"],
            "explained": all_of_it[i].get("explained"),
        }
        for i in range(count)
        for number, (name, all_of_it) in enumerate(told.items())
    ]


def any_pair(found: Mapping[str, Any]) -> bool:
    """Whether some layer has two or more LoRA experts."""
    return any(layer for layers in found["redundancy"].values() for layer in layers)


def _as_script(values: Any) -> str:
    """JSON that is safe inside a <script> element: no character can end it."""
    return (
        json.dumps(values).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return versions
