import json
import re

import pytest

from btx_jax.config import Config, ReportConfig
from btx_jax.errors import UserError
from btx_jax.stages import report
from tests.reporting.test_reporting import RESULTS, results


def test_a_report_is_made_from_what_stages_left_behind(tmp_path, capsys):
    for name in ("evaluate", "seed", "mix"):
        (tmp_path / name).mkdir()
    (tmp_path / "evaluate" / "results.json").write_text(json.dumps(RESULTS))
    evaluated = {
        "evaluate": {
            "models": {"seed": "x", "btx": str(tmp_path / "finetune" / "checkpoints" / "3")}
        }
    }
    (tmp_path / "evaluate" / "config.json").write_text(json.dumps(evaluated))
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "config.json").write_text(json.dumps({"init": str(tmp_path / "mix")}))
    (tmp_path / "finetune" / "done.json").write_text('{"seconds": 2.0}')
    (tmp_path / "mix" / "config.json").write_text("{}")
    (tmp_path / "seed" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "lm_loss": 5.0}) + "\n" for s in range(1, 9))
    )
    (tmp_path / "seed" / "done.json").write_text('{"seconds": 12.5}')
    sources = [f"{tmp_path}/{name}/checkpoints/9" for name in ("expert_math", "seed")]
    (tmp_path / "mix" / "done.json").write_text(json.dumps({"seconds": 1.0, "experts": sources}))
    runs = {name: str(tmp_path / name) for name in ("seed", "mix")}
    report.run(
        Config("report", report=ReportConfig(str(tmp_path / "evaluate"), runs)), tmp_path / "out"
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["wall_seconds"] == {"seed": 12.5, "mix": 1.0}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert re.search(r"<th>domain</th><th>layer</th><th>math</th><th>seed</th>", page), (
        "the experts have the names of their runs"
    )
    assert "expert_math" in capsys.readouterr().out
    assert (tmp_path / "out" / "done.json").exists()


def test_without_an_evaluation_there_is_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="run the evaluate stage first"):
        report.run(
            Config("report", report=ReportConfig(str(tmp_path / "none"), {})), tmp_path / "out"
        )


def test_other_seeds_are_compared(tmp_path, capsys):
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(json.dumps(results(number / 10)))
    evaluate, *others = (str(tmp_path / str(number)) for number in range(3))
    report.run(
        Config("report", report=ReportConfig(evaluate, others=tuple(others))), tmp_path / "out"
    )
    assert (
        "| BTX beats its seed (btx < seed, mean) | -0.600 ± 0.000 | 3 | held |"
        in (tmp_path / "out" / "comparison.md").read_text()
    )
    assert "BTX beats its seed" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"config.report.others\[0\]: .*run the evaluate stage first"
    ):
        report.run(
            Config("report", report=ReportConfig(evaluate, others=(str(tmp_path / "no"),))),
            tmp_path / "out2",
        )
