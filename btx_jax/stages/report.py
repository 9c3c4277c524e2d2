"""Report: the table, summary.json and report.html of a pipeline, from what its stages left on disk."""

import json
import time
from pathlib import Path

from rich.console import Console

from btx_jax.config import Config
from btx_jax.errors import UserError
from btx_jax.reporting.page import render
from btx_jax.reporting.summary import read_curves, summarise, table
from btx_jax.reporting.workdir import CONFIG, DONE, claim, finish, write_json


def run(config: Config, workdir: Path) -> None:
    assert config.report
    start = time.monotonic()
    claim(workdir, config)
    path = Path(config.report.evaluate) / "results.json"
    if not path.exists():
        raise UserError(f"config.report.evaluate: {path} does not exist; run the evaluate stage first")
    results = json.loads(path.read_text(encoding="utf-8"))
    runs = {name: Path(directory) for name, directory in config.report.runs.items()}
    done = {name: json.loads((d / DONE).read_text(encoding="utf-8")) for name, d in runs.items() if (d / DONE).exists()}
    curves = read_curves(config.report.runs)
    summary = summarise(results, curves, {name: values["seconds"] for name, values in done.items()})
    sources: list[str] = next((values["experts"] for values in done.values() if "experts" in values), [])
    experts = [Path(source).parent.parent.name.removeprefix("expert_") for source in sources]
    configs = {name: (d / CONFIG).read_text(encoding="utf-8") for name, d in runs.items() if (d / CONFIG).exists()}
    page = render(f"Branch-Train-MiX: {workdir.parent.name}", summary, curves, experts, configs)
    temporary = workdir / ".report.html"
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(workdir / "report.html")
    write_json(workdir / "summary.json", summary)
    Console().print(table(summary))
    finish(workdir, seconds=time.monotonic() - start)
