"""Report: tables, summary.json and report.html of a pipeline, from the files of its stages; with
several seeds also comparison.md, and for the study its tables and figure, study.md and
study.svg."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from btx_jax import environment
from btx_jax.checkpoints.training_state import DIRECTORY
from btx_jax.config.config import Config, ReportConfig
from btx_jax.config.config_dict import from_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import Mistakes, UserError
from btx_jax.hub_names import PROTOCOL
from btx_jax.mixing.recipe_file import expert_sources
from btx_jax.output import none_left_empty, read_json, write_json, write_text
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.paths import to_path
from btx_jax.reporting import study
from btx_jax.reporting.compare import markdown
from btx_jax.reporting.summary import print_tables, read_curves, summarise, tables
from btx_jax.rundir import (
    CONFIG,
    PLAN,
    claim,
    finish,
    has_begun,
    look_up,
    recorded_config,
    recorded_results,
)
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import plain

log = logging.getLogger(__name__)

INPUTS = "inputs.json"  # written by the evaluate stage: hashes of weights and text
LONGEST_CHAIN = 100  # runs that started from each other; a longer chain is a cycle


def run(config: Config, workdir: Path) -> None:
    start = time.monotonic()
    look_up(workdir, config)
    require_right(config)
    claim(workdir, config)
    first_then_others(lambda: write(config, workdir) if is_first() else None)
    finish(workdir, seconds=time.monotonic() - start)


def report(workdirs: Sequence[str], out: str) -> Path:
    """Write a report of the first run, compared with the others if there are any; it replaces an
    earlier report. Returns the page's path. Raises UserError for a directory without an
    evaluation."""
    first, *others = (_evaluated(_absolute(path, "WORKDIRS")) for path in workdirs)
    config = dataclasses.replace(first, others=tuple(other.evaluate for other in others))
    target = _absolute(out, "--out")
    for other in (first, *others):
        read_results(other.evaluate, "WORKDIRS")
    with none_left_empty(target):
        target.mkdir(parents=True, exist_ok=True)
        write(Config("report", report=config), target)
    return target / "report.html"


def _absolute(path: str, key: str) -> Path:
    return to_path(path, key).absolute()


def _evaluated(workdir: Path) -> ReportConfig:
    """The report config of a directory: for a pipeline, its own report's; for an evaluation, just
    the evaluation."""
    recorded = recorded_config(workdir)
    if "pipeline" not in recorded:
        return ReportConfig(str(workdir))
    pipeline = from_dict(Config, recorded, str(workdir / CONFIG)).pipeline or {}
    kinds = {stage.config.stage: name for name, stage in pipeline.items()}
    if own := pipeline[kinds["report"]].config.report if "report" in kinds else None:
        runs = {name: _within(workdir, path) for name, path in own.runs.items()}
        return dataclasses.replace(own, evaluate=_within(workdir, own.evaluate), runs=runs)
    return ReportConfig(str(workdir / kinds.get("evaluate", "evaluate")))


def _within(workdir: Path, path: str) -> str:
    """A path with `@NAME` resolved in the pipeline's directory."""
    return str(workdir / path[1:]) if path.startswith("@") else path


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.report
    with mistakes.gather():  # fail before a pipeline's first stage rather than after its last
        environment.require("report", "config.stage='report'")
    named = {"config.report.evaluate": config.report.evaluate} | {
        f"config.report.others[{i}]": path for i, path in enumerate(config.report.others)
    }
    for key, path in named.items():
        if path not in coming:
            with mistakes.gather():
                read_results(path, key)
    return None


def write(config: Config, workdir: Path) -> None:
    assert config.report
    results = read_results(config.report.evaluate, "config.report.evaluate")
    others = [
        read_results(path, f"config.report.others[{i}]")
        for i, path in enumerate(config.report.others)
    ]
    evaluated = to_path(config.report.evaluate, "config.report.evaluate")
    runs = {
        name: to_path(directory, f"config.report.runs.{name}")
        for name, directory in config.report.runs.items()
    }
    plan = evaluated.parent / PLAN  # the plan of the pipeline to which the evaluation belongs
    # A pipeline's report has the name of the pipeline's directory.
    of = workdir.parent if has_begun(workdir.parent) else workdir
    summary = _write_page(
        workdir,
        of.name,
        results,
        runs,
        evaluated,
        others,
        config.report.continual,
        read_json(plan) if plan.exists() else {},
    )
    if summary["comparison"]:
        write_text(workdir / "comparison.md", markdown(summary["comparison"], summary["models"]))
        print(plain((workdir / "comparison.md").read_text(encoding="utf-8")))
    paths = (config.report.evaluate, *config.report.others)
    values = [
        study.with_barriers(each["models"], to_path(path, "config.report.evaluate"))
        for each, path in zip((results, *others), paths, strict=True)
    ]
    if told := study.tables(values):
        from btx_jax.reporting import study_figure  # matplotlib comes with an extra

        write_text(workdir / "study.md", told)
        write_text(workdir / "study.svg", study_figure.figure(values))
        print(plain(told))


def _write_page(
    workdir: Path,
    name: str,
    results: Mapping[str, Any],
    runs: Mapping[str, Path],
    evaluated: Path | None = None,
    others: Sequence[Any] = (),
    continual: Sequence[str] = (),
    planned: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write report.html and summary.json; returns the summary. name: title of the report.
    evaluated: directory of the results, None if there are several. planned: contents of plan.json,
    {} without a plan."""
    from btx_jax.reporting.page import render  # matplotlib comes with an extra

    recorded = {run: recorded_results(directory) for run, directory in runs.items()}
    done = {run: values for run, values in recorded.items() if values is not None}
    seconds = {run: values["seconds"] for run, values in done.items()}
    curves = read_curves(runs)
    summary = summarise(results, curves, seconds, others, continual, done, planned)
    configs = {
        run: (directory / CONFIG).read_text(encoding="utf-8")
        for run, directory in runs.items()
        if has_begun(directory)
    }
    provenance = {
        run: {"config": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for run, text in configs.items()
    }
    experts = expert_names(evaluated, summary["shown"]) if evaluated else []
    title = f"{name}: {'gains' if summary['gains'] else 'held-out losses'}"
    write_text(workdir / "report.html", render(title, summary, curves, experts, provenance))
    write_json(workdir / "summary.json", summary)
    print_tables(tables(summary))
    return summary


def side_by_side(workdirs: Sequence[str], out: str) -> Path:
    """Write a report of different runs evaluated on the same text, with each model under its run's
    name.
    Domains whose held-out text differs are left out, with a warning. Returns the page's path.
    Raises UserError for a directory without an evaluation, and when no domain is left."""
    target = _absolute(out, "--out")
    homes = [_absolute(path, "WORKDIRS") for path in workdirs]
    told = {label: _evaluated(home) for label, home in zip(_labels(homes), homes, strict=True)}
    results = {label: read_results(each.evaluate, "WORKDIRS") for label, each in told.items()}
    domains = _common_domains({label: to_path(c.evaluate, "WORKDIRS") for label, c in told.items()})
    if not domains:
        raise UserError(
            f"WORKDIRS: {', '.join(workdirs)} have no domain with the same held-out text; their"
            " losses cannot be compared"
        )
    models = {
        f"{label} {name}": model
        | {
            key: {domain: model[key][domain] for domain in domains}
            for key in ("nats_per_token", "bits_per_byte")
        }
        for label, found in results.items()
        for name, model in found["models"].items()
    }
    runs = {
        f"{label} {name}": to_path(path, "WORKDIRS")
        for label, each in told.items()
        for name, path in each.runs.items()
    }
    with none_left_empty(target):
        target.mkdir(parents=True, exist_ok=True)
        _write_page(target, target.name, {"domains": domains, "models": models}, runs)
    return target / "report.html"


def _labels(homes: Sequence[Path]) -> list[str]:
    """The shortest path endings that distinguish the runs."""
    for length in range(1, max(len(home.parts) for home in homes) + 1):
        labels = ["/".join(home.parts[-length:]) for home in homes]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError("WORKDIRS: one directory is given twice; leave it out")


def _common_domains(evaluated: Mapping[str, Path]) -> list[str]:
    """Domains whose held-out text is the same in all runs."""
    texts = {label: read_json(path / INPUTS) for label, path in evaluated.items()}
    first = next(iter(texts.values()))
    named = [key.removeprefix("text.") for key in first if key.startswith("text.")]
    common = [
        name for name in named if len({found.get(f"text.{name}") for found in texts.values()}) == 1
    ]
    for name in dict.fromkeys(named):
        if name not in common:
            log.warning(
                "%s: its held-out text differs between the runs; the domain is left out", name
            )
    return common


def read_results(directory: str, key: str) -> Any:
    path = to_path(directory, key) / "results.json"
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; run the evaluate stage first")
    return read_json(path)


def expert_names(evaluate: Path, shown: str) -> list[str]:
    """Names of the shown mixture's experts: the models it was mixed from, found by tracing its
    checkpoint back to the mix, or by the recipe stored with a mixture's weights. Empty when
    unknown."""
    config = recorded_config(evaluate)
    path = config["evaluate"]["models"].get(shown, "") if config else ""
    for _ in range(LONGEST_CHAIN):
        if path.startswith(PROTOCOL):
            break
        place = to_path(path, f"config.evaluate.models.{shown}")
        run = next((d for d in (place, *place.parents) if has_begun(d)), None)
        if not path or run is None:
            break
        done = recorded_results(run) or {}
        if sources := done.get("experts") or expert_sources(run):
            return source_names(sources)
        path = recorded_config(run).get("init", "")
    return []


def source_names(sources: Sequence[str]) -> list[str]:
    """Names of experts for a page: their models' directories, numbered where several experts come
    from one."""
    places = [Path(source) for source in sources]
    runs = [place.parent.parent if place.parent.name == DIRECTORY else place for place in places]
    names = [run.name.removeprefix("expert_") for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]
