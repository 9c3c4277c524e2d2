"""Report: the table, summary.json and report.html of a pipeline, from what its stages left on disk;
with other seeds, comparison.md, and of the study its tables, study.md."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
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
    claim,
    finish,
    has_begun,
    look_up,
    recorded_config,
    recorded_results,
)
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import plain

LONGEST_CHAIN = 100  # of runs that started from each other; a longer one is a circle


def run(config: Config, workdir: Path) -> None:
    start = time.monotonic()
    look_up(workdir, config)
    require_right(config)
    claim(workdir, config)
    first_then_others(lambda: write(config, workdir) if is_first() else None)
    finish(workdir, seconds=time.monotonic() - start)


def report(workdirs: Sequence[str], out: str) -> Path:
    """Write a report of what finished runs left on disk, anew at each call: of the first, compared
    with the others, if any. Returns the page's path. Raises UserError for a directory without an
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
    """For a pipeline's directory, what its own report shows; for an evaluation's, only that."""
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
    with mistakes.gather():  # before a pipeline's first stage, not behind its last
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
    from btx_jax.reporting.page import render  # matplotlib comes with an extra

    assert config.report
    results = read_results(config.report.evaluate, "config.report.evaluate")
    others = [
        read_results(path, f"config.report.others[{i}]")
        for i, path in enumerate(config.report.others)
    ]
    runs = {
        name: to_path(directory, f"config.report.runs.{name}")
        for name, directory in config.report.runs.items()
    }
    recorded = {name: recorded_results(directory) for name, directory in runs.items()}
    done = {name: values for name, values in recorded.items() if values is not None}
    curves = read_curves(config.report.runs)
    summary = summarise(
        results,
        curves,
        {name: values["seconds"] for name, values in done.items()},
        others,
        config.report.continual,
        done,
    )
    configs = {
        name: (directory / CONFIG).read_text(encoding="utf-8")
        for name, directory in runs.items()
        if has_begun(directory)
    }
    provenance = {
        name: {"config": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in configs.items()
    }
    evaluated = to_path(config.report.evaluate, "config.report.evaluate")
    # A pipeline's report lies in its directory; one of its own has its own name.
    of = workdir.parent if has_begun(workdir.parent) else workdir
    title = f"{of.name}: {'what was gained' if summary['gains'] else 'held-out losses'}"
    write_text(
        workdir / "report.html",
        render(
            title,
            summary,
            curves,
            expert_names(evaluated, summary["shown"]),
            provenance,
        ),
    )
    write_json(workdir / "summary.json", summary)
    print_tables(tables(summary))
    if summary["comparison"]:
        write_text(workdir / "comparison.md", markdown(summary["comparison"], summary["models"]))
        print(plain((workdir / "comparison.md").read_text(encoding="utf-8")))
    paths = (config.report.evaluate, *config.report.others)
    values = [
        study.with_barriers(each["models"], to_path(path, "config.report.evaluate"))
        for each, path in zip((results, *others), paths, strict=True)
    ]
    if told := study.tables(values):
        write_text(workdir / "study.md", told)
        print(plain(told))


def read_results(directory: str, key: str) -> Any:
    path = to_path(directory, key) / "results.json"
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; run the evaluate stage first")
    return read_json(path)


def expert_names(evaluate: Path, shown: str) -> list[str]:
    """Names of the shown mixture's experts: the models it was mixed from, found by tracing its
    checkpoint back to the mix, or to the recipe beside a mixture's weights. Empty when unknown."""
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
    """What a page calls the experts: their models' directories, with a number where several experts
    come from one."""
    places = [Path(source) for source in sources]
    runs = [place.parent.parent if place.parent.name == DIRECTORY else place for place in places]
    names = [run.name.removeprefix("expert_") for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]
