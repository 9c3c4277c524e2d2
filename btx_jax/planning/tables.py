"""A plan as tables for a terminal, and as JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from btx_jax.planning.expected import Expected
from btx_jax.planning.plan import Plan, Stage
from btx_jax.terminal import duration, plain, size

COMMON = "All start from the seed, whose training is not counted here."
MANY_EPOCHS = 4  # up to here, repeated text is nearly as good as new (Muennighoff et al., 2023)


def tables(plan: Plan, price: float) -> list[Table]:
    """A plan as tables to print. price: of one chip for one hour; 0 leaves costs out."""
    read = [_text(plan)] if any(stage.reads for stage in plan.stages) else []
    return [_stages(plan, price), *read, *([_otherwise(plan)] if plan.otherwise else [])]


def warnings(plan: Plan) -> Iterator[str]:
    for stage in plan.stages:
        if not stage.fits:
            yield (
                f"{stage.name}: does not fit; `btx compile` names the cheapest change that helps"
            )
        for read in stage.reads:
            if (read.epochs or 0) > MANY_EPOCHS:
                yield (
                    f"{stage.name}: reads {read.where} {read.epochs:.1f} times; beyond"
                    f" {MANY_EPOCHS}, further repetition helps less and less"
                )
    yield from plan.shared
    reads = (read for stage in plan.stages for read in stage.reads)
    if unknown := sorted({read.where for read in reads if read.epochs is None}):
        yield (
            f"not tokenised yet, so the number of epochs is unknown: {', '.join(unknown)}; the"
            " prepare stage, or `btx run`, tokenises it"
        )


def as_json(plan: Plan, price: float) -> dict[str, Any]:
    return {
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "otherwise": [dataclasses.asdict(other) for other in plan.otherwise],
        "chips": plan.chips,
        "seconds": plan.seconds,
        "critical_seconds": sum(stage.seconds for stage in plan.critical),
        "critical": [stage.name for stage in plan.critical],
        "cost": _hours(plan.seconds) * plan.chips * price,
    }


def _stages(plan: Plan, price: float) -> Table:
    columns = ["stage", "tokens", "steps", "FLOPs", "memory", "time", "chip-hours", "storage"]
    if price:
        columns.append("cost")
    made = Table(title="cost of each stage", show_footer=True)
    critical = sum(stage.seconds for stage in plan.critical)
    totals = {
        "stage": f"in all; side by side {duration(critical)}",
        "tokens": f"{sum(stage.tokens for stage in plan.stages):,}",
        "FLOPs": f"{sum(stage.flops for stage in plan.stages):.2g}",
        "time": duration(plan.seconds),
        "chip-hours": f"{_hours(plan.seconds) * plan.chips:.2f}",
        "storage": size(sum(stage.storage for stage in plan.stages)),
        "cost": f"{_hours(plan.seconds) * plan.chips * price:,.2f}",
    }
    for i, column in enumerate(columns):
        made.add_column(
            column,
            footer=totals.get(column, ""),
            justify="right" if i else "left",
            overflow="fold",
        )
    waited = {stage.name for stage in plan.critical}
    for stage in plan.stages:
        cells = _cells(stage, plan.chips)
        if price:
            cells.append(f"{_hours(stage.seconds) * plan.chips * price:,.2f}")
        name = Text(plain(stage.name), "bold" if stage.name in waited else "")
        made.add_row(name, *cells)
    return made


def _cells(stage: Stage, chips: int) -> list[str]:
    trains = bool(stage.steps)
    return [
        f"{stage.tokens:,}" if trains else "",
        f"{stage.steps:,}" if trains else "",
        f"{stage.flops:.2g}" if trains else "",
        size(stage.memory) if stage.memory else "",
        duration(stage.seconds) if stage.seconds else "",
        f"{_hours(stage.seconds) * chips:.2f}" if stage.seconds else "",
        size(stage.storage) if stage.storage else "",
    ]


def _text(plan: Plan) -> Table:
    made = Table(title="how much of each text is read")
    for i, column in enumerate(("stage", "domain", "text", "tokens available", "read", "epochs")):
        made.add_column(column, justify="right" if i > 2 else "left", overflow="fold")
    for stage in plan.stages:
        for i, read in enumerate(stage.reads):
            epochs = "?" if read.epochs is None else f"{read.epochs:.2f}"
            made.add_row(
                Text(plain(stage.name) if not i else ""),
                Text(plain(read.domain)),
                Text(plain(read.where)),
                "?" if read.there is None else f"{read.there:,}",
                f"{read.read:,.0f}",
                Text(epochs, "bold" if (read.epochs or 0) > MANY_EPOCHS else ""),
            )
    return made


def _otherwise(plan: Plan) -> Table:
    columns = ["", "tokens", "FLOPs", "time", "chip-hours"]
    beyond = {what for other in plan.otherwise if other.expected for what in other.expected.beyond}
    if is_expected := any(other.expected for other in plan.otherwise):
        columns.append("held-out loss")
    made = Table(
        title="three ways to use the same tokens",
        caption=" ".join([COMMON, *([expectation(sorted(beyond))] if is_expected else [])]),
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for other in plan.otherwise:
        chips = _hours(other.chip_seconds) * plan.chips
        made.add_row(
            other.name,
            f"{other.tokens:,}",
            f"{other.flops:.2g}",
            duration(other.seconds),
            f"{chips:.2f}",
            *([change(other.expected)] if is_expected else []),
        )
    return made


def change(expected: Expected | None) -> str:
    """The expected change of the held-out loss as text, in percent with its interval; "" for
    None."""
    if not expected:
        return ""
    shares = (expected.change, expected.low, expected.high)
    change, low, high = (round(100 * share, 1) + 0.0 for share in shares)  # + 0.0: no -0.0
    return f"{change:+.1f} % ({low:+.1f} to {high:+.1f})"


def expectation(beyond: Sequence[str]) -> str:
    """Explain where the expected losses come from. beyond: clauses as in `Expected.beyond`."""
    told = (
        "Held-out loss: the expected change from the seed's, averaged over domains, and in"
        " brackets the range expected to hold in 95 % of runs, from the study in"
        " docs/results.md."
    )
    if not beyond:
        return told
    return (
        f"{told} This run differs from that study: {'; '.join(beyond)}. The ranges are"
        " therefore too narrow, and the numbers say at best which way is better."
    )


def _hours(seconds: float) -> float:
    return seconds / 3600
