"""The summary of a pipeline: one dictionary, one table, made from what its stages left on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from btx_jax.errors import UserError, suggest
from btx_jax.evaluation.continual import measures
from btx_jax.reporting.compare import compare
from btx_jax.reporting.metrics import FILE, read_metrics
from btx_jax.terminal import plain

WINDOW, SHOWN_POINTS = 10, 6  # of loss curves given as numbers
LAST_STEPS = 20  # whose mean dropped fraction is reported
SEED = "seed"  # the model that all others start from, where one has this name
COSTS = ("tokens", "flops", "chip_seconds", "critical_seconds", "peak_bytes")
SHOWN = ("nats_per_token", "bits_per_byte", *COSTS, "params_total", "params_active")


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def summarise(
    results: Mapping[str, Any],
    curves: Mapping[str, list[dict[str, Any]]],
    seconds: Mapping[str, float],
    others: Sequence[Mapping[str, Any]] = (),
    continual: Sequence[str] = (),
) -> dict[str, Any]:
    """results: of the evaluate stage; others: the same arms' with other seeds. curves: run -> its
    metrics lines. seconds: stage -> wall time.

    models: least trained first; where one is called `seed`, its costs are taken off all others'.
    Where a part of a model (beyond the seed) was trained elsewhere, its costs are None.
    gains: against the seed and the experts.
    routing: of every mixture; shown: the one that the page looks into, `btx` or else the longest
    trained. dropped_fraction: mean of the last steps of the last run that trained a mixture. lora:
    what LoRA experts became, of every model that has some. continual: scores and measures of tasks
    learnt in turn (ReportConfig.continual).
    """
    by_training = sorted(results["models"].items(), key=lambda item: item[1]["tokens"])
    models = {
        name: {key: model[key] for key in (*SHOWN, *(("tasks",) if "tasks" in model else ()))}
        for name, model in by_training
    }
    base = results["models"].get(SEED, {})
    for name, model in models.items():
        known = base.get("unknown", []) if name != SEED else []
        if set(results["models"][name].get("unknown", [])) - set(known):
            model |= dict.fromkeys(COSTS)
    for name, model in models.items():
        if name != SEED and base:
            model |= {
                cost: None if model[cost] is None else model[cost] - base[cost]
                for cost in COSTS
                if cost != "peak_bytes"
            }
    routing = {name: model["routing"] for name, model in by_training if "routing" in model}
    routed = [[line for line in lines if "routing" in line] for lines in curves.values()]
    dropped = next(
        (
            mean(mean(line["routing"]["dropped"]) for line in lines[-LAST_STEPS:])
            for lines in reversed(routed)
            if lines
        ),
        0.0,
    )
    return {
        "domains": results["domains"],
        "models": models,
        "gains": gains(models, results["domains"]),
        "routing": routing,
        "shown": "btx" if "btx" in routing else next(reversed(routing), ""),
        "dropped_fraction": dropped,
        "curves": {
            name: points for name, lines in curves.items() if (points := curve_points(lines))
        },
        "wall_seconds": dict(seconds),
        "lora": {
            name: results["models"][name]["lora"]
            for name, _ in by_training
            if "lora" in results["models"][name]
        },
        "continual": learnt_in_turn(results["models"], continual) if continual else None,
        "comparison": (
            compare([results["models"], *(other["models"] for other in others)]) if others else None
        ),
    }


def learnt_in_turn(models: Mapping[str, Any], continual: Sequence[str]) -> dict[str, Any]:
    """{models, tasks, scores [t][t] in percent, continual.measures of them}. Raises UserError for a
    model or task that was not tried."""
    names, tasks = zip(*(pair.split(":", 1) for pair in continual), strict=True)
    scores = []
    for name in names:
        if name not in models:
            raise UserError(f"config.report.continual: no model {name!r}; {suggest(name, models)}")
        found = models[name].get("tasks", {})
        if missing := [task for task in tasks if task not in found]:
            raise UserError(
                f"config.report.continual: {name} was not tried on {missing[0]!r};"
                f" {suggest(missing[0], found)}"
            )
        scores.append([100 * next(iter(found[task].values())) for task in tasks])
    return {"models": names, "tasks": tasks, "scores": scores, **measures(scores)}


def gains(models: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
    """Of every model but the seed, domain by domain, nats per token. over_seed: L[seed] - L[model].
    specialist_gap: L[model] - the best expert's. recovered: over_seed as a share of the best
    expert's own, where that is at least 0.01. forgetting: how much worse than the seed, 0 if
    better, on the domain on which the best expert gains least.
    """
    experts = [name for name in models if name.startswith("expert_")]
    if SEED not in models or not experts:
        return {}
    loss = {name: model["nats_per_token"] for name, model in models.items()}
    best = {d: min(loss[name][d] for name in experts) for d in domains}
    general = min(domains, key=lambda d: loss[SEED][d] - best[d])
    table: dict[str, Any] = {"general": general, "models": {}}
    for name in models:
        if name == SEED:
            continue
        over = {d: loss[SEED][d] - loss[name][d] for d in domains}
        reach = {d: loss[SEED][d] - best[d] for d in domains}
        table["models"][name] = {
            "over_seed": over,
            "specialist_gap": {d: loss[name][d] - best[d] for d in domains},
            "recovered": {d: over[d] / reach[d] if reach[d] >= 0.01 else None for d in domains},
            "forgetting": max(-over[general], 0.0),
        }
    return table


def curve_points(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, mean training loss of the WINDOW steps up to it) at SHOWN_POINTS places spread evenly
    over a run, the last one its end."""
    steps = [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line]
    count = min(SHOWN_POINTS, len(steps))
    ends = [round((i + 1) * len(steps) / count) for i in range(count)]
    return [
        (steps[end - 1][0], mean(loss for _, loss in steps[max(end - WINDOW, 0) : end]))
        for end in ends
    ]


def read_curves(runs: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every run that trained."""
    files = {name: Path(path) / FILE for name, path in runs.items()}
    return {name: read_metrics(file) for name, file in files.items() if file.exists()}


def amount(value: float | None, form: str) -> str:
    """A cost as it is shown."""
    return "unknown" if value is None else format(value, form)


def scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Held-out nats per token, model by domain, the best of each column bold; and what each model
    took."""
    domains = summary["domains"]
    losses, costs = (
        Table(title="held-out loss, nats per token (lower is better)"),
        Table(title="what it took, the seed's own training left out"),
    )
    for column in ("model", *domains, "mean"):
        losses.add_column(
            _shown(column), justify="left" if column == "model" else "right", no_wrap=True
        )
    for column in ("model", "M tokens", "FLOPs", "chip-s", "critical s", "peak MiB", "active"):
        costs.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    rows = {
        name: [m["nats_per_token"][d] for d in domains] for name, m in summary["models"].items()
    }
    rows = {name: [*row, mean(row)] for name, row in rows.items()}
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        model = summary["models"][name]
        losses.add_row(
            _shown(name),
            *(Text(f"{x:.3f}", "bold" if x == b else "") for x, b in zip(row, best, strict=True)),
        )
        costs.add_row(
            _shown(name),
            amount(scaled(model["tokens"], 1e6), ".2f"),
            amount(model["flops"], ".1e"),
            amount(model["chip_seconds"], ".0f"),
            amount(model["critical_seconds"], ".0f"),
            amount(scaled(model["peak_bytes"], 2**20), ".0f"),
            f"{model['params_active'] / 1e6:.2f}M",
        )
    return [losses, costs]


def _shown(name: str) -> Text:
    """A name that may look like markup."""
    return Text(plain(name))


def task_table(models: Mapping[str, Any]) -> Table:
    """Every metric of every test set, model by model, with standard errors."""
    made = Table(title="test sets")
    for column in ("model", "test set", "metric", "value"):
        made.add_column(column, justify="right" if column == "value" else "left")
    for name, model in models.items():
        for task, metrics in model.get("tasks", {}).items():
            for metric, value in metrics.items():
                error = (
                    f" ± {metrics[f'{metric}_stderr']:.3f}" if f"{metric}_stderr" in metrics else ""
                )
                if not metric.endswith("_stderr"):
                    made.add_row(_shown(name), _shown(task), metric, f"{value:.3f}{error}")
    return made
