"""Report: the table, summary.json and report.html of a pipeline, from what its stages left on disk;
with other seeds, comparison.md."""

import hashlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from btx_jax.config import Config
from btx_jax.errors import Mistakes, UserError
from btx_jax.model_config import ModelConfig
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.reporting.compare import markdown
from btx_jax.reporting.page import render
from btx_jax.reporting.summary import read_curves, summarise, tables
from btx_jax.reporting.workdir import (
    CONFIG,
    DONE,
    claim,
    finish,
    look_up,
    read_json,
    write_json,
    write_text,
)
from btx_jax.stages import Coming, require_right


def run(config: Config, workdir: Path) -> None:
    start = time.monotonic()
    look_up(workdir, config)
    require_right(config)
    claim(workdir, config)
    first_then_others(lambda: write(config, workdir) if is_first() else None)
    finish(workdir, seconds=time.monotonic() - start)


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.report
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
    runs = {name: Path(directory) for name, directory in config.report.runs.items()}
    done = {name: read_json(d / DONE) for name, d in runs.items() if (d / DONE).exists()}
    curves = read_curves(config.report.runs)
    summary = summarise(
        results,
        curves,
        {name: values["seconds"] for name, values in done.items()},
        others,
        config.report.continual,
    )
    configs = {
        name: (d / CONFIG).read_text(encoding="utf-8")
        for name, d in runs.items()
        if (d / CONFIG).exists()
    }
    provenance = {
        name: {"config": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in configs.items()
    }
    title = f"{workdir.parent.name}: what was gained"
    write_text(
        workdir / "report.html",
        render(
            title,
            summary,
            curves,
            expert_names(Path(config.report.evaluate), summary["shown"]),
            provenance,
        ),
    )
    write_json(workdir / "summary.json", summary)
    console = Console()
    for table in tables(summary):
        console.print(table)
    if summary["comparison"]:
        write_text(workdir / "comparison.md", markdown(summary["comparison"], summary["models"]))
        console.print((workdir / "comparison.md").read_text(encoding="utf-8"), markup=False)


def read_results(directory: str, key: str) -> Any:
    path = Path(directory) / "results.json"
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; run the evaluate stage first")
    return read_json(path)


def expert_names(evaluate: Path, shown: str) -> list[str]:
    """Of the mixture that is shown: the runs it was mixed from, found by going back from its
    checkpoint to the mix. Empty when unknown."""
    config = evaluate / CONFIG
    path = (
        Path(read_json(config)["evaluate"]["models"].get(shown, "")) if config.exists() else Path()
    )
    for _ in range(len(path.parts)):  # no chain of runs is longer
        workdir = next(
            (d for d in (path, *path.parents) if (d / CONFIG).exists() and (d / DONE).exists()),
            None,
        )
        if workdir is None:
            break
        if sources := read_json(workdir / DONE).get("experts"):
            return [Path(source).parent.parent.name.removeprefix("expert_") for source in sources]
        path = Path(read_json(workdir / CONFIG).get("init", ""))
    return []
