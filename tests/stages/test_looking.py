"""Observing a run: trackers, profiles, goodput, test sets, the best step."""

import dataclasses
import importlib.util
import json
import math
import shutil

import jax
import pytest
from mlflow import MlflowClient

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.config.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    LogConfig,
    MeshConfig,
    PipelineStage,
    ProfileConfig,
    TaskConfig,
)
from btx_jax.errors import ConfigError, UserError
from btx_jax.reporting import trackers
from btx_jax.reporting.goodput import ACTIVITIES
from btx_jax.reporting.metrics import numbers
from btx_jax.stages import train as stage
from tests.reporting.runs import finished, wandb_rows
from tests.stages.test_evaluate import DENSE
from tests.stages.test_train import metrics

pytestmark = pytest.mark.usefixtures("one_device_only")

LOG = LogConfig("team/project", "experiment", "group")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture
def fresh(training):
    """A run of `steps` steps from random weights, with changed sections."""

    def make(steps, every=100, keep=2, best="heldout", log=None, profile="", **train):
        config = training("scratch", steps, DENSE, learning_rate=1e-2, **train)
        return dataclasses.replace(
            config,
            checkpoint=CheckpointConfig(every, keep, best),
            log=log or LogConfig(),
            profile=ProfileConfig(profile),
        )

    return make


class Killed(BaseException):
    """Raised to simulate SIGKILL."""


@pytest.fixture
def kill_at(monkeypatch):
    """Kill a run after it has written the line of a step."""

    def kill_at(step):
        real = stage.Loop.log

        def log(self, number, *args):
            real(self, number, *args)
            if number == step:
                raise Killed

        monkeypatch.setattr(stage.Loop, "log", log)
        return lambda: monkeypatch.setattr(stage.Loop, "log", real)

    return kill_at


def of_steps(workdir):
    """step -> its numbers, from all its lines."""
    found = {}
    for line in metrics(workdir):
        found.setdefault(line["step"], {}).update(numbers(line))
    return found


def in_mlflow(workdir, name="experiment"):
    client = MlflowClient(tracking_uri=(workdir / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == name]
    (found,) = client.search_runs([experiment.experiment_id])
    return found, {
        name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics
    }


def in_wandb(workdir):
    """(the run's id, [(step, numbers)]) as written by the last start."""
    files = (workdir / "wandb").glob("offline-run-*/*.wandb")
    file = max(files, key=lambda file: file.stat().st_mtime)
    rows = [
        (step, {k: json.loads(v) for k, v in row.items() if not k.startswith("_")})
        for step, row in wandb_rows(file)
    ]
    return file.stem, rows


def test_trackers_hold_the_numbers_of_metrics_jsonl_and_what_the_run_came_to(
    fresh,
    run,
    tmp_path,
    offline,
):
    run(fresh(6, log=LOG, eval_every=3), tmp_path / "seed")
    want = of_steps(tmp_path / "seed")
    assert list(want) == list(range(7)) and "heldout/words/nats_per_token" in want[6]
    _, rows = in_wandb(tmp_path / "seed")
    assert dict(rows) == want
    found, histories = in_mlflow(tmp_path / "seed")
    told = {
        step: {name: m.value for name, h in histories.items() for m in h if m.step == step}
        for step in want
    }
    done = json.loads((tmp_path / "seed" / "done.json").read_text())
    results = numbers(done)
    assert {k: v for k, v in told[6].items() if k in want[6] and k not in results} == {
        k: v for k, v in want[6].items() if k not in results
    }
    assert {step: told[step] for step in range(6)} == {step: want[step] for step in range(6)}
    assert results["seconds"] == found.data.metrics["seconds"] and results["best/step"] == 6
    assert found.info.status == "FINISHED" and found.info.run_name == "seed"
    assert found.data.tags["group"] == "group"
    assert found.data.params["train.steps"] == "6"
    (file,) = (tmp_path / "seed" / "wandb").glob("offline-run-*/*.wandb")
    records = finished(file)
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (started.entity, started.project, started.run_group) == ("team", "project", "group")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["train"]["steps"] == 6
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.summary.update
            }
    assert json.loads(summary["best/step"]) == 6 and json.loads(summary["steps"]) == 6


def test_a_killed_run_goes_on_in_its_trackers_runs_no_step_twice_none_missing(
    fresh,
    run,
    tmp_path,
    offline,
    kill_at,
):
    config = fresh(9, every=4, log=LOG, eval_every=2)
    restore = kill_at(7)
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    first = {line["step"]: line for line in metrics(tmp_path / "seed") if "loss" in line}
    assert list(first)[-1] == 7, "three steps behind the checkpoint"
    found, _ = in_mlflow(tmp_path / "seed")
    assert found.info.status == "KILLED"
    id_1, rows_1 = in_wandb(tmp_path / "seed")
    restore()
    run(config, tmp_path / "seed")
    want = of_steps(tmp_path / "seed")
    id_2, rows_2 = in_wandb(tmp_path / "seed")
    assert id_1 == id_2
    assert [step for step, _ in rows_1] == list(range(8))
    assert [step for step, _ in rows_2] == list(range(10)), "the last file holds the whole run"
    found, histories = in_mlflow(tmp_path / "seed")
    assert found.info.status == "FINISHED"
    assert [m.step for m in histories["loss"]] == list(range(1, 10))
    assert [m.step for m in histories["heldout/words/nats_per_token"]] == [0, 2, 4, 6, 8, 9]
    assert [m.value for m in histories["loss"]] == [want[s]["loss"] for s in range(1, 10)]
    assert [row["loss"] for _, row in rows_2[1:]] == [want[s]["loss"] for s in range(1, 10)]
    assert rows_2[:8] == rows_1, "the steps that were done twice keep the first numbers"


def test_a_line_that_a_kill_kept_from_a_tracker_is_made_up(
    fresh, run, tmp_path, offline, monkeypatch
):
    """The kill comes after the line is in metrics.jsonl and before trackers receive it."""
    real = trackers.Trackers.write

    def write(self, step, scalars):
        if step == 5:
            raise Killed
        real(self, step, scalars)

    monkeypatch.setattr(trackers.Trackers, "write", write)
    with pytest.raises(Killed):
        run(fresh(7, every=2, log=LOG), tmp_path / "seed")
    assert metrics(tmp_path / "seed")[-1]["step"] == 5
    monkeypatch.setattr(trackers.Trackers, "write", real)
    run(fresh(7, every=2, log=LOG), tmp_path / "seed")
    _, histories = in_mlflow(tmp_path / "seed")
    assert [m.step for m in histories["loss"]] == list(range(1, 8))
    assert [step for step, _ in in_wandb(tmp_path / "seed")[1]] == list(range(8))


def test_a_tracker_that_is_named_later_is_told_from_the_first_step(
    fresh,
    run,
    tmp_path,
    offline,
    kill_at,
):
    restore = kill_at(5)
    with pytest.raises(Killed):
        run(fresh(6, every=2), tmp_path / "seed")
    restore()
    run(fresh(6, every=2, log=LogConfig(mlflow="experiment")), tmp_path / "seed")
    _, histories = in_mlflow(tmp_path / "seed")
    assert [m.step for m in histories["loss"]] == list(range(1, 7))


def test_a_line_that_a_kill_kept_from_a_tracker_is_told_by_the_next_start(
    fresh, run, tmp_path, offline, monkeypatch
):
    """metrics.jsonl had the line, MLflow a part of it."""
    config = fresh(6, every=3, log=LogConfig(mlflow="experiment"))
    write = trackers.MLflow.write

    def cut(self, step, scalars):
        if step == 4:
            write(self, step, {"loss": scalars["loss"]})
            raise Killed
        write(self, step, scalars)

    monkeypatch.setattr(trackers.MLflow, "write", cut)
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    monkeypatch.setattr(trackers.MLflow, "write", write)
    run(config, tmp_path / "seed")
    _, histories = in_mlflow(tmp_path / "seed")
    for name in ("loss", "learning_rate"):
        assert [m.step for m in histories[name]] == list(range(1, 7))


def test_a_store_that_does_not_have_the_run_is_told_all_in_a_new_one(
    fresh, run, tmp_path, offline, kill_at, caplog
):
    """Such as the directory of another machine, on which a run on a bucket resumes."""
    config = fresh(6, every=3, log=LogConfig(mlflow="experiment"))
    alive = kill_at(4)
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    alive()
    (lost,) = (tmp_path / "seed" / "mlflow").glob("*/*/metrics")
    shutil.rmtree(lost.parent)
    run(config, tmp_path / "seed")
    assert "not found" not in caplog.text
    found, history = in_mlflow(tmp_path / "seed")
    assert found.info.status == "FINISHED"
    assert [metric.step for metric in history["loss"]] == list(range(1, 7))
    told = json.loads((tmp_path / "seed" / "trackers.json").read_text())
    assert told == {"mlflow:experiment": found.info.run_id}


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    fresh,
    run,
    tmp_path,
    offline,
    monkeypatch,
):
    real = trackers.MLflow.write

    def write(self, step, scalars):
        if step > 2:
            raise ConnectionError("the server is\ndown")
        real(self, step, scalars)

    monkeypatch.setattr(trackers.MLflow, "write", write)
    told = run(fresh(5, log=LOG), tmp_path / "seed")
    assert [line for line in told if "config.log.mlflow" in line] == [
        "config.log.mlflow: the server is down; disabled until the run is resumed;"
        " metrics.jsonl and TensorBoard continue"
    ]
    assert set(of_steps(tmp_path / "seed")) == set(range(6))
    assert [step for step, _ in in_wandb(tmp_path / "seed")[1]] == list(range(6)), "the other"
    assert (tmp_path / "seed" / "done.json").exists()


def test_a_tracker_that_cannot_be_reached_is_told_once_and_the_run_goes_on(
    fresh, run, tmp_path, offline, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    told = run(fresh(3, log=LogConfig(mlflow="experiment")), tmp_path / "seed")
    (line,) = [line for line in told if "config.log.mlflow" in line]
    assert "127.0.0.1" in line and "\n" not in line and len(line) < 500
    assert (tmp_path / "seed" / "done.json").exists()


def test_what_cannot_be_looked_at_is_refused_with_everything_else_before_any_work(
    fresh, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, real=importlib.util.find_spec: None
        if name in ("wandb", "mlflow") else real(name),
    )  # fmt: skip
    monkeypatch.setattr(stage, "make_train_step", lambda *_: pytest.fail("compiled"))
    config = fresh(5, log=LOG, eval_tasks=("arc_eazy",))
    with pytest.raises(ConfigError) as error:
        stages.run(config, tmp_path / "seed")
    assert error.value.args == (
        "config.train.eval_tasks: no test set 'arc_eazy'; did you mean 'arc_easy'? known: arc_easy,"
        " piqa, openbook_qa, commonsense_qa, gsm8k, humaneval",
        "config.log.wandb: needs a package: pip install 'btx_jax[wandb]'",
        "config.log.mlflow: needs a package: pip install 'btx_jax[mlflow]'",
    )
    assert not (tmp_path / "seed").exists()


def test_wandb_without_credentials_is_refused(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(
        ConfigError, match=r"^config\.log\.wandb: no credentials.*WANDB_MODE=offline"
    ):
        stages.run(fresh(5, log=LogConfig("project")), tmp_path / "seed")


def test_the_profile_holds_the_chosen_steps_and_no_others(fresh, run, tmp_path):
    told = run(fresh(9, profile="4:7"), tmp_path / "seed")
    assert profiled(tmp_path / "seed") == {"steps_4_to_6": [4, 5, 6]}
    assert (
        "wrote a profile; to view it: pip install xprof; xprof"
        f" --logdir={tmp_path}/seed/profile" in told
    )


def profiled(workdir):
    """session -> numbers of the steps that it annotates."""
    found = {}
    for file in (workdir / "profile").glob("plugins/profile/*/*.xplane.pb"):
        data = jax.profiler.ProfileData.from_file(str(file))
        events = [e for plane in data.planes for line in plane.lines for e in line.events]
        steps = [dict(e.stats)["step_num"] for e in events if e.name == "train_step"]
        found[file.parent.name] = sorted(steps)
    return found


def test_a_resumed_run_profiles_what_is_left_and_nothing_beyond(
    fresh,
    run,
    tmp_path,
    kill_at,
):
    restore = kill_at(5)
    with pytest.raises(Killed):
        run(fresh(9, every=4), tmp_path / "seed")
    restore()
    restore = kill_at(8)
    with pytest.raises(Killed):
        run(fresh(9, every=4, profile="2:4"), tmp_path / "seed")
    assert not (tmp_path / "seed" / "profile").exists()
    restore()
    run(fresh(9, every=4, profile="3:7"), tmp_path / "seed")
    assert profiled(tmp_path / "seed") == {"steps_5_to_6": [5, 6]}


def test_the_shares_of_wall_time_add_up_over_all_starts_and_lost_work_is_told(
    fresh,
    run,
    tmp_path,
    kill_at,
):
    config = fresh(9, every=4, eval_every=4)
    restore = kill_at(7)
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    before = [line for line in metrics(tmp_path / "seed") if "goodput" in line]
    assert [line["step"] for line in before] == list(range(1, 8))
    restore()
    restore = kill_at(5)  # again, before anything new is saved
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    restore()
    told = run(config, tmp_path / "seed")
    lines = [line for line in metrics(tmp_path / "seed") if "goodput" in line]
    done = json.loads((tmp_path / "seed" / "done.json").read_text())
    for line in [*before, *lines, done]:
        assert set(line["goodput"]) == {*ACTIVITIES}
        assert sum(line["goodput"].values()) == pytest.approx(1, abs=1e-9)
        assert min(line["goodput"].values()) >= 0

    def seconds(line):
        return {name: share * line["wall_seconds"] for name, share in line["goodput"].items()}

    assert [x["wall_seconds"] for x in lines] == sorted(x["wall_seconds"] for x in lines)
    assert done["wall_seconds"] > before[-1]["wall_seconds"] + done["seconds"]
    kept, last = (seconds(before[i])["step"] for i in (3, 6))
    lost, end = seconds(done)["lost"], seconds(done)
    assert lost > last - kept > 0, "steps 5 to 7, then 5"
    assert seconds(lines[3])["lost"] == 0
    for activity in ("compile", "restore", "save", "evaluate", "other"):
        assert end[activity] > seconds(before[-1])[activity] > 0, activity
    assert end["step"] > kept
    assert any(line.startswith("seed: ") and " s of wall time: " in line for line in told)


def test_test_sets_in_training_give_what_evaluating_that_steps_checkpoint_gives(
    fresh,
    run,
    tmp_path,
):
    items = [
        {"query": f"w{i} w{i + 1}", "choices": ["w1 w2", f"w{i} w{i}", "w3"], "gold": i % 3}
        for i in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    words = [{"context": f"{i} {i}", "answer": str(i)} for i in range(6)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(x) + "\n" for x in words))
    tasks = {
        "own": TaskConfig("multiple_choice", str(tmp_path / "own.jsonl"), "{query}"),
        "said": TaskConfig("exact_match", str(tmp_path / "said.jsonl"), "{context}", max_tokens=4),
    }
    config = fresh(
        12, every=6, keep=9, eval_tasks=tuple(tasks), eval_tasks_every=6, eval_tasks_limit=30,
        best="tasks/own/accuracy",
    )  # fmt: skip
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tasks=tasks))
    run(config, tmp_path / "seed")
    lines = [line for line in metrics(tmp_path / "seed") if "tasks" in line]
    assert [line["step"] for line in lines] == [0, 6, 12]
    limited = {name: dataclasses.replace(task, limit=30) for name, task in tasks.items()}
    models = {str(s): str(tmp_path / "seed" / "checkpoints" / str(s)) for s in (6, 12)}
    evaluate = EvaluateConfig(models, tasks=limited)
    stages.run(
        Config("evaluate", evaluate=evaluate, compute=config.compute, mesh=MeshConfig()),
        tmp_path / "evaluated",
    )
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    for line in lines[1:]:
        assert line["tasks"] == results["models"][str(line["step"])]["tasks"]
    accuracy = {line["step"]: line["tasks"]["own"]["accuracy"] for line in lines[1:]}
    done = json.loads((tmp_path / "seed" / "done.json").read_text())
    assert done["best"]["step"] == max(accuracy, key=lambda s: (accuracy[s], -s))


def test_the_best_step_is_kept_beside_the_newest_through_kills_and_can_be_named(
    fresh,
    run,
    tmp_path,
    kill_at,
    monkeypatch,
):
    losses = {0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 1.5}
    step = iter(())

    def make(*_):
        return lambda params, check: {
            "words": {"nats_per_token": losses[next(step)], "bits_per_byte": 1.0}
        }

    monkeypatch.setattr(stage, "make_evaluation", make)
    config = fresh(10, every=2, keep=1, eval_every=2)
    step, restore = iter(losses), kill_at(7)
    with pytest.raises(Killed):
        run(config, tmp_path / "seed")
    assert steps_in(tmp_path / "seed") == [4, 6]
    best = digest(load_params(find_checkpoint(tmp_path / "seed" / "checkpoints" / "4")))
    with pytest.raises(UserError, match=r"checkpoints/best: only known once .*seed has finished"):
        find_checkpoint(tmp_path / "seed" / "checkpoints" / "best")
    restore()
    step = iter((8, 10))
    told = run(config, tmp_path / "seed")
    assert steps_in(tmp_path / "seed") == [4, 10]
    assert f"seed: step 4, the best by heldout, is saved in {tmp_path}/seed/checkpoints/4" in told
    done = json.loads((tmp_path / "seed" / "done.json").read_text())
    assert done["best"] == {"step": 4, "score": 1.0}
    named = find_checkpoint(tmp_path / "seed" / "checkpoints" / "best")
    assert named.metadata.step == 4 and digest(load_params(named)) == best
    assert find_checkpoint(tmp_path / "seed").metadata.step == 10


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_a_loss_that_is_no_number_is_never_the_best(fresh, run, tmp_path, monkeypatch):
    losses = iter([9.0, math.nan, 2.0, 3.0])
    monkeypatch.setattr(
        stage, "make_evaluation",
        lambda *_: lambda params, check: {
            "words": {"nats_per_token": next(losses), "bits_per_byte": 1.0}
        },
    )  # fmt: skip
    run(fresh(6, every=2, keep=9, eval_every=2), tmp_path / "seed")
    assert json.loads((tmp_path / "seed" / "done.json").read_text())["best"]["step"] == 4


@pytest.mark.slow
@pytest.mark.cli
def test_trackers_lack_nothing_after_a_kill_that_nobody_hears(offline, cli):
    """W&B writes in blocks, from its own process."""
    cli.environment.pop("WANDB_SERVICE", None)  # of this process's own runs
    seed = cli.seed("run", "--config.log.wandb=p", "--config.log.mlflow=experiment", steps=40)
    process = cli.start(*seed)
    cli.wait_for_step("run", 17, process)
    process.kill()
    process.communicate()
    _, told = cli.run(*seed)
    assert "Traceback" not in told and "config.log" not in told, told[-3000:]
    assert [step for step, _ in in_wandb(cli.home / "run")[1]] == list(range(1, 41))
    _, histories = in_mlflow(cli.home / "run")
    assert [m.step for m in histories["loss"]] == list(range(1, 41))


def test_a_pipelines_stages_are_one_group_and_evaluation_tells_what_it_measured(
    fresh, tmp_path, offline
):
    train = fresh(3, every=3)
    evaluate = Config(
        "evaluate",
        evaluate=EvaluateConfig({"seed": "@seed"}, rows=4),
        data=dataclasses.replace(train.data, tokenizer=""),
        compute=train.compute,
        mesh=MeshConfig(),
    )
    own = dataclasses.replace(evaluate, log=LogConfig(mlflow="another", group="own"))
    config = Config(
        "pipeline",
        pipeline={
            "seed": PipelineStage(train),
            "evaluate": PipelineStage(evaluate, needs=("seed",)),
            "again": PipelineStage(own, needs=("seed",)),
        },
        log=LogConfig(mlflow="experiment"),
    )
    stages.run(config, tmp_path / "all")
    groups = {}
    for name, experiment in (
        ("seed", "experiment"),
        ("evaluate", "experiment"),
        ("again", "another"),
    ):
        found, _ = in_mlflow(tmp_path / "all" / name, experiment)
        groups[found.info.run_name] = found.data.tags["group"]
        results = tmp_path / "all" / name / "results.json"
        if results.exists():
            loss = json.loads(results.read_text())["models"]["seed"]["nats_per_token"]["words"]
            assert found.data.metrics["seed/nats_per_token/words"] == loss
    assert groups == {"seed": "all", "evaluate": "all", "again": "own"}


@pytest.mark.slow
@pytest.mark.cli
def test_of_several_processes_the_first_tells_and_each_profiles(cli, offline):
    """On one machine, both parts of the profile have the same name, and the later one stays."""
    cli.run(*cli.seed("other", steps=2))  # makes the cache of the text
    seed = cli.seed("run", "--config.log.mlflow=experiment", "--config.profile.steps=3:5", steps=6)
    processes = cli.start_several(2, 2, *seed)
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told[0][-3000:]
    _, histories = in_mlflow(cli.home / "run")
    assert [m.step for m in histories["loss"]] == list(range(1, 7)), "once"
    assert profiled(cli.home / "run") == {"steps_3_to_4": [3, 4]}
    assert "profiled" in told[0]
