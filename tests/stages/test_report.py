import json
import re

import pytest

from btx_jax.config.config import Config, ReportConfig
from btx_jax.config.config_dict import to_dict
from btx_jax.errors import UserError
from btx_jax.planning.expected import Expected
from btx_jax.planning.plan import Otherwise, Plan, Stage
from btx_jax.planning.tables import as_json
from btx_jax.presets import recipes
from btx_jax.reporting.goodput import ACTIVITIES
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
    tried = [
        {"step": s, "tasks": {"arc": {"accuracy": s / 10, "accuracy_stderr": 0.1}}} for s in (0, 8)
    ]
    (tmp_path / "seed" / "metrics.jsonl").write_text(
        "".join(
            json.dumps(x) + "\n"
            for x in [*({"step": s, "lm_loss": 5.0} for s in range(1, 9)), *tried]
        )
    )
    shares = dict.fromkeys(ACTIVITIES, 0.0) | {"step": 0.75, "compile": 0.25}
    done = {"seconds": 12.5, "wall_seconds": 20.0, "goodput": shares}
    done["best"] = {"step": 5, "score": 1.25}
    (tmp_path / "seed" / "done.json").write_text(json.dumps(done))
    sources = [f"{tmp_path}/{name}/checkpoints/9" for name in ("expert_math", "seed")]
    (tmp_path / "mix" / "done.json").write_text(json.dumps({"seconds": 1.0, "experts": sources}))
    runs = {name: str(tmp_path / name) for name in ("seed", "mix")}
    report.run(
        Config("report", report=ReportConfig(str(tmp_path / "evaluate"), runs)), tmp_path / "out"
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["wall_seconds"] == {"seed": 20.0, "mix": 1.0}
    assert summary["goodput"] == {"seed": {"wall_seconds": 20.0, "goodput": shares}}
    assert summary["best"] == {"seed": {"step": 5, "score": 1.25}}
    assert summary["test_sets"] == {"seed": {"arc/accuracy": [[0, 0.0], [8, 0.8]]}}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert re.search(r"<th>domain</th><th>layer</th><th>math</th><th>seed</th>", page), (
        "the experts have the names of their runs"
    )
    assert "<h1>out: gains</h1>" in page
    assert "<td>seed</td><td>20.0</td><td>75.0</td>" in page
    assert "0.000 (0), 0.800 (8)" in page and "step 5 of seed (1.250)" in page
    said = capsys.readouterr().out
    assert "expert_math" in said and "use of time" in said
    assert (tmp_path / "out" / "done.json").exists()


def test_what_was_planned_stands_beside_what_was_measured(tmp_path):
    home = pipeline(tmp_path / "demo", 0)
    seed = Stage("seed", "train", (), tokens=2000, steps=4, flops=3e9, seconds=10.0, storage=2**21)
    way = Otherwise("dense training", 9000, 1e9, 2.0, 2.0, Expected(-0.1, -0.12, -0.08, ("so",)))
    planned = {"on": "v5e:2x2", **as_json(Plan((seed,), 4, (way,)), price=0)}
    (tmp_path / "demo" / "plan.json").write_text(json.dumps(planned))
    report.report([home], str(tmp_path / "elsewhere"))
    page = (tmp_path / "elsewhere" / "report.html").read_text()
    assert "expected, for v5e:2x2" in page
    row = ("seed", "2,000", "3.00e+09", "10.0", "12.5", "2")
    assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert (
        "<td>-10.0 % (-12.0 to -8.0)</td>" in page
        and "differs from that study: so. The ranges are therefore too narrow" in page
    )
    assert "a run measures while it trains" in page and "<code>train.eval_rows</code> rows" in page


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


def pipeline(directory, number):
    """Write the files of a pipeline with two stages and a report."""
    config = to_dict(recipes.demo())
    for name in ("seed", "evaluate", "report"):
        (directory / name).mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evaluate" / "results.json").write_text(json.dumps(results(number / 10)))
    (directory / "seed" / "done.json").write_text('{"seconds": 12.5}')
    return str(directory)


def test_a_finished_pipeline_is_reported_again_and_several_are_compared(tmp_path, capsys):
    runs = [pipeline(tmp_path / f"demo_{number}", number) for number in range(3)]
    page = report.report(runs[:1], runs[0])
    assert page == tmp_path / "demo_0" / "report.html"
    assert "<h1>demo_0: gains</h1>" in page.read_text()
    summary = json.loads((tmp_path / "demo_0" / "summary.json").read_text())
    assert summary["wall_seconds"] == {"seed": 12.5}
    assert not summary["comparison"]
    for _ in range(2):  # repeatable
        report.report([*runs[:2], f"{runs[2]}/evaluate"], str(tmp_path / "three"))
    told = (tmp_path / "three" / "comparison.md").read_text()
    assert "| BTX beats its seed (btx < seed, mean) | -0.600 ± 0.000 | 3 | held |" in told
    assert "BTX beats its seed" in capsys.readouterr().out


def test_a_directory_without_an_evaluation_is_refused_and_nothing_made(tmp_path):
    good = pipeline(tmp_path / "good", 0)
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "config.json").write_text(json.dumps(to_dict(recipes.seed("tiny"))))
    with pytest.raises(UserError, match=r"WORKDIRS: .*/seed/results.json does not exist"):
        report.report([good, str(tmp_path / "seed")], str(tmp_path / "deep" / "out"))
    (tmp_path / "good" / "evaluate" / "results.json").unlink()
    with pytest.raises(UserError, match=r"good/evaluate/results.json does not exist; run the"):
        report.report([good], good)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("experts: [{source_model: models/math}, {source_model: runs/code}]", ["math", "code"]),
        ("experts: [{source_model: m}, {source_model: m}, {source_model: x}]", ["m 1", "m 2", "x"]),
        ("{method: split, chunks: 2, experts: [{source_model: a/math}]}", ["math 1", "math 2"]),
        ("{method: blend, experts: [{source_model: a}, {source_model: b}]}", []),
    ],
)
def test_experts_of_a_recipe_have_the_names_of_their_sources(tmp_path, recipe, names):
    for name, file, text in (
        ("mixture", "mergekit_moe_config.yml", recipe),
        ("mixture", "config.json", "{}"),
        ("finetune", "config.json", json.dumps({"init": str(tmp_path / "mixture")})),
        ("evaluate", "config.json", json.dumps({"evaluate": {"models": {"x": str(tmp_path / "finetune")}}})),
    ):  # fmt: skip
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(text)
    assert report.expert_names(tmp_path / "evaluate", "x") == names


def test_the_names_of_experts_are_unknown_where_nothing_tells_them(tmp_path):
    assert report.expert_names(tmp_path, "x") == []
    (tmp_path / "a").mkdir()
    circle = {"init": str(tmp_path / "a"), "evaluate": {"models": {"x": str(tmp_path / "a")}}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(circle))
    assert report.expert_names(tmp_path / "a", "x") == []
    (tmp_path / "a" / "mergekit_moe_config.yml").write_text("experts: 3")
    with pytest.raises(UserError, match=r"mergekit_moe_config.yml is damaged: .*; delete it"):
        report.expert_names(tmp_path / "a", "x")


def measured(path, number, **texts):
    """A pipeline with the hashes of its held-out text."""
    pipeline(path, number)
    inputs = {f"text.{domain}": value for domain, value in texts.items()}
    (path / "evaluate" / "inputs.json").write_text(json.dumps(inputs | {"models.seed": "x"}))
    return str(path)


def test_different_runs_stand_side_by_side(tmp_path, capsys, caplog):
    domains = results(0.0)["domains"]
    same = dict.fromkeys(domains, "same")
    one = measured(tmp_path / "a" / "run", 0, **same)
    other = measured(tmp_path / "b" / "run", 1, **same | {domains[0]: "another"})
    page = report.side_by_side([one, other], str(tmp_path / "both"))
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert summary["domains"] == domains[1:]
    assert f"{domains[0]}: its held-out text differs between the runs" in caplog.text
    assert not summary["comparison"] and not summary["gains"]
    for run, number in (("a", 0), ("b", 1)):
        told = results(number / 10)["models"]
        assert {f"{run}/run {name}" for name in told} <= set(summary["models"])
        for name, model in told.items():
            shown = summary["models"][f"{run}/run {name}"]["nats_per_token"]
            assert shown == {d: model["nats_per_token"][d] for d in domains[1:]}
    assert "<h1>both: held-out losses</h1>" in page.read_text()
    assert "a/run seed" in capsys.readouterr().out


def test_runs_on_other_text_are_not_compared(tmp_path):
    domains = results(0.0)["domains"]
    one = measured(tmp_path / "one", 0, **dict.fromkeys(domains, "x"))
    other = measured(tmp_path / "other", 1, **dict.fromkeys(domains, "y"))
    with pytest.raises(UserError, match="no domain with the same held-out text"):
        report.side_by_side([one, other], str(tmp_path / "both"))
    with pytest.raises(UserError, match="given twice"):
        report.side_by_side([one, one], str(tmp_path / "both"))
    assert not (tmp_path / "both").exists()
