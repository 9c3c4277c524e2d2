"""The summary of a pipeline: one dictionary and its tables, from the files of its stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table
from rich.text import Text

from btx_jax.errors import UserError, suggest
from btx_jax.evaluation.continual import measures
from btx_jax.reporting.compare import compare
from btx_jax.reporting.goodput import ACTIVITIES
from btx_jax.reporting.metrics import parts, read_metrics
from btx_jax.terminal import Console, plain

WINDOW, SHOWN_POINTS = 10, 6  # of loss curves in numbers: steps in a mean, points of a curve
WIDEST = 200  # maximum characters of a table's width
LAST_STEPS = 20  # steps whose mean dropped fraction is reported
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
    done: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    planned: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Summarise a pipeline.

    results: of the evaluate stage; others: of the same arms with other seeds. curves: run -> its
    metrics lines. seconds: stage -> wall time. done: run -> the results it recorded on finishing.
    planned: plan.json of `btx plan`, {} without a plan.

    Returns a dictionary with:

    seed, experts: the roles given by the results, "" and [] if absent.
    models: the seed, its experts, then the others as listed.
    before: the costs of the seed itself, which are subtracted from all others; None where unknown.
    gains: over the seed and the experts.
    routing: of every mixture.
    shown: the mixture that the page examines, by its role or else the one trained longest.
    dropped_fraction: mean over the last steps of the last run that trained a mixture; None if none
        did.
    lora: analysis of LoRA experts, for every model that has any.
    continual: scores and measures of continual learning (ReportConfig.continual).
    test_sets: run -> TASK/METRIC -> [(step, value)] during training.
    probes: branch -> [(step, held-out loss, loss of the average with its seed, barrier)], as means
        over domains.
    goodput: run -> shares of its wall time.
    best: run -> the best step that it kept.
    plan: as `planned`.
    """
    roles, found = results.get("roles", {}), results["models"]
    seed, experts = roles.get("seed", ""), list(roles.get("experts", ()))
    names = list(dict.fromkeys([*([seed] if seed else ()), *experts, *found]))
    models = {
        name: {
            key: found[name][key]
            for key in (*SHOWN, *(key for key in ("tasks", "samples") if key in found[name]))
        }
        for name in names
    }
    unknown = {name: set(found[name].get("unknown", ())) for name in names}
    spent = {cost: found[seed][cost] for cost in COSTS[:-1]} if seed else {}
    before = dict.fromkeys(spent) if seed and unknown[seed] else spent
    for name, model in models.items():
        if unknown[name] - (unknown.get(seed, set()) if name != seed else set()):
            model |= dict.fromkeys(COSTS)  # some weights were made elsewhere
        model |= {cost: difference(model[cost], value) for cost, value in spent.items()}
    routing = {name: found[name]["routing"] for name in names if "routing" in found[name]}
    longest = max(routing, key=lambda name: found[name]["tokens"] or 0, default="")
    routed = [[line for line in lines if "routing" in line] for lines in curves.values()]
    dropped = next(
        (
            mean(mean(line["routing"]["dropped"]) for line in lines[-LAST_STEPS:])
            for lines in reversed(routed)
            if lines
        ),
        None,
    )
    return {
        "domains": results["domains"],
        "seed": seed,
        "experts": experts,
        "models": models,
        "before": before,
        "gains": gains(models, results["domains"], seed, experts),
        "routing": routing,
        "shown": roles["mixture"] if roles.get("mixture") in routing else longest,
        "dropped_fraction": dropped,
        "curves": {
            name: points for name, lines in curves.items() if (points := curve_points(lines))
        },
        "test_sets": {
            name: tried for name, lines in curves.items() if (tried := test_set_curves(lines))
        },
        "probes": {
            name: probed for name, lines in curves.items() if (probed := probe_points(lines))
        },
        # Over all starts of a run, if the run counted them.
        "wall_seconds": {
            name: done.get(name, {}).get("wall_seconds", last) for name, last in seconds.items()
        },
        "goodput": {
            name: {key: told[key] for key in ("wall_seconds", "goodput")}
            for name, told in done.items()
            if "goodput" in told
        },
        "best": {name: told["best"] for name, told in done.items() if "best" in told},
        "lora": {name: found[name]["lora"] for name in names if "lora" in found[name]},
        "plan": dict(planned),
        "continual": learnt_in_turn(found, continual) if continual else None,
        "comparison": (
            compare([found, *(other["models"] for other in others)]) if others else None
        ),
    }


def difference(cost: float | None, spent: float | None) -> float | None:
    """cost - spent; None if either is unknown."""
    return None if cost is None or spent is None else cost - spent


def amount(value: float | None, form: str) -> str:
    """A cost formatted for display."""
    return "unknown" if value is None else format(value, form)


def learnt_in_turn(models: Mapping[str, Any], continual: Sequence[str]) -> dict[str, Any]:
    """{models, tasks, scores [t][t] in percent, and `continual.measures` of them}. Raises UserError
    for a model or task that was not scored."""
    names, tasks = zip(*(pair.split(":", 1) for pair in continual), strict=True)
    scores = []
    for name in names:
        if name not in models:
            raise UserError(f"config.report.continual: no model {name!r}; {suggest(name, models)}")
        found = models[name].get("tasks", {})
        if missing := [task for task in tasks if task not in found]:
            raise UserError(
                f"config.report.continual: {name} was not evaluated on {missing[0]!r};"
                f" {suggest(missing[0], found)}"
            )
        scores.append([100 * next(iter(found[task].values())) for task in tasks])
    return {"models": names, "tasks": tasks, "scores": scores, **measures(scores)}


def gains(
    models: Mapping[str, Any], domains: Sequence[str], seed: str, experts: Sequence[str]
) -> dict[str, Any]:
    """For every model but the seed, by domain, in nats per token.

    over_seed: L[seed] - L[model]. specialist_gap: L[model] - the best expert's loss. recovered:
    over_seed as a share of the best expert's own, if that is at least 0.01. general: the domain on
    which the best expert gains least; forgetting: how much worse than the seed the model is on it,
    negative if better. Empty without a seed or experts.
    """
    if not (seed and experts and domains):
        return {}
    loss = {name: model["nats_per_token"] for name, model in models.items()}
    best = {d: min(loss[name][d] for name in experts) for d in domains}
    general = min(domains, key=lambda d: loss[seed][d] - best[d])
    table: dict[str, Any] = {"general": general, "models": {}}
    for name in models:
        if name == seed:
            continue
        over = {d: loss[seed][d] - loss[name][d] for d in domains}
        reach = {d: loss[seed][d] - best[d] for d in domains}
        table["models"][name] = {
            "over_seed": over,
            "specialist_gap": {d: loss[name][d] - best[d] for d in domains},
            "recovered": {d: over[d] / reach[d] if reach[d] >= 0.01 else None for d in domains},
            "forgetting": -over[general],
        }
    return table


def curve_points(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, mean training loss of the WINDOW steps up to it) at SHOWN_POINTS steps evenly spread
    over a run, ending with its last."""
    steps = [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line]
    count = min(SHOWN_POINTS, len(steps))
    ends = [round((i + 1) * len(steps) / count) for i in range(count)]
    return [
        (steps[end - 1][0], mean(loss for _, loss in steps[max(end - WINDOW, 0) : end]))
        for end in ends
    ]


def test_set_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """TASK/METRIC -> (step, value) for every time the run was scored on it, without standard
    errors."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for task, metrics in line.get("tasks", {}).items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    found.setdefault(f"{task}/{metric}", []).append((line["step"], value))
    return found


def probe_points(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float, float]]:
    """(step, held-out loss of the branch, of its average with the seed, barrier) for every mixing
    probe."""
    return [
        (
            line["step"],
            over_domains(line["heldout"]),
            over_domains(line["heldout_mixed"]),
            line["barrier"],
        )
        for line in lines
        if "barrier" in line
    ]


def over_domains(heldout: Mapping[str, Mapping[str, float]]) -> float:
    """Mean of the domains' nats per token."""
    return mean(domain["nats_per_token"] for domain in heldout.values())


def read_curves(runs: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every run that trained."""
    return {name: read_metrics(home) for name, home in runs.items() if parts(home)}


def _shown(name: str) -> Text:
    """A name as literal text, whatever characters it contains."""
    return Text(plain(name))


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column may have long names, which are wrapped rather than truncated."""
    made = Table(title=title)
    for i, column in enumerate(columns):
        made.add_column(_shown(column), justify="right" if i else "left", overflow="fold")
    return made


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables; to a file or a pipe at the tables' own width."""
    console = Console()
    if not console.is_terminal:
        wide = console.options.update(max_width=WIDEST)
        widths = [console.measure(table, options=wide).maximum for table in tables]
        console.width = max([console.width, *widths])
    for table in tables:
        console.print(table)


def loss_table(models: Mapping[str, Any], domains: Sequence[str]) -> Table:
    """Held-out nats per token, model by domain, with the best of each column in bold."""
    made = _table("held-out loss, nats per token (lower is better)", ("model", *domains, "mean"))
    made.caption = (
        "On evaluate.rows rows of each domain; the losses in a run's log differ, as they are"
        " on train.eval_rows."
    )
    rows = {name: [m["nats_per_token"][d] for d in domains] for name, m in models.items()}
    rows = {name: [*row, mean(row)] for name, row in rows.items()}
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        cells = zip(row, best, strict=True)
        made.add_row(_shown(name), *(Text(f"{x:.3f}", "bold" if x == b else "") for x, b in cells))
    return made


def cost_table(summary: Mapping[str, Any]) -> Table:
    """Cost of each model, without the seed's."""
    left_out = ", excluding the seed's" if summary["seed"] else ""
    columns = ("model", "tokens", "FLOPs", "chip-s", "critical s", "peak MiB", "active")
    made = _table(f"training cost{left_out}", columns)
    for name, model in summary["models"].items():
        made.add_row(
            _shown(name),
            amount(model["tokens"], ",.0f"),
            amount(model["flops"], ".1e"),
            amount(model["chip_seconds"], ".0f"),
            amount(model["critical_seconds"], ".0f"),
            amount(scaled(model["peak_bytes"], 2**20), ".0f"),
            f"{model['params_active'] / 1e6:.2f}M",
        )
    return made


def scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def goodput_table(summary: Mapping[str, Any]) -> Table:
    """Shares of every run's wall time over all its starts, in percent."""
    made = _table("use of time, % of wall time", ("run", "wall s", *ACTIVITIES))
    for name, told in summary["goodput"].items():
        shares = (f"{100 * told['goodput'][activity]:.1f}" for activity in ACTIVITIES)
        made.add_row(_shown(name), f"{told['wall_seconds']:.0f}", *shares)
    return made


def tables(summary: Mapping[str, Any]) -> list[Table]:
    losses = [loss_table(summary["models"], summary["domains"])] if summary["domains"] else []
    goodput = [goodput_table(summary)] if summary["goodput"] else []
    return [*losses, cost_table(summary), *goodput]


def task_table(models: Mapping[str, Any]) -> Table:
    """Every metric of every test set for each model, with standard errors."""
    made = Table(title="test sets")
    for column in ("model", "test set", "metric", "value"):
        made.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for name, model in models.items():
        for task, metrics in model.get("tasks", {}).items():
            for metric, value in metrics.items():
                error = (
                    f" ± {metrics[f'{metric}_stderr']:.3f}" if f"{metric}_stderr" in metrics else ""
                )
                if not metric.endswith("_stderr"):
                    made.add_row(_shown(name), _shown(task), _shown(metric), f"{value:.3f}{error}")
    return made
