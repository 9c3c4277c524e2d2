"""Submission of jobs as their needs finish, and queued resources with a fake gcloud that records
its calls."""

import json
import os
import sys

import pytest

from btx_jax.backends.cloud import Place
from btx_jax.backends.jobs import Job, drive, jobs_of, parse_topology
from btx_jax.backends.queued_resources import QueuedResources
from btx_jax.errors import ConfigError, UserError
from tests.conftest import ROOT

GCLOUD = """#!{python}
import json, pathlib, sys
file = pathlib.Path({file!r})
state = json.loads(file.read_text())
state["calls"].append(sys.argv[1:])
verb, name = sys.argv[4:6]
if verb == "create":
    state["is"][name] = "ACTIVE"
    state["scripts"][name] = pathlib.Path(next(w for w in sys.argv if "startup-script=" in w).partition("startup-script=")[2]).read_text()
elif verb == "delete":
    del state["is"][name]
file.write_text(json.dumps(state))
if verb == "describe":
    if name == "p-forbidden":
        sys.exit("ERROR: PERMISSION_DENIED")
    if name not in state["is"]:
        sys.exit("ERROR: NOT_FOUND: resource not found")
    print(state["is"][name])
"""


class Engine:
    """A backend for drive() that records calls in order; a job finishes when it has been kept
    twice."""

    def __init__(self):
        self.calls = []

    def submit(self, job):
        self.calls.append(("submit", job.name))

    def keep(self, job):
        self.calls.append(("keep", job.name))

    def is_finished(self, job):
        return self.calls.count(("keep", job.name)) >= 2


def job(name, *needs, topology="v5p:2x2x2"):
    return Job(
        name,
        needs,
        ("python", "-m", "btx_jax.launch", f"--only={name}"),
        "gs://b/runs/p",
        topology,
    )


def test_jobs_are_submitted_once_and_after_their_needs():
    engine = Engine()
    jobs = [job("a"), job("b"), job("mix", "a", "b"), job("finetune", "mix")]
    drive(jobs, engine, engine.is_finished, poll_seconds=0)
    submitted = [name for call, name in engine.calls if call == "submit"]
    assert submitted == ["a", "b", "mix", "finetune"]
    assert engine.calls.index(("submit", "mix")) > max(
        i for i, call in enumerate(engine.calls) if call in (("keep", "a"), ("keep", "b"))
    )


def test_a_submitter_that_starts_again_leaves_finished_jobs_alone():
    engine = Engine()
    jobs = [job("a"), job("mix", "a")]
    drive(jobs, engine, lambda one: one.name == "a" or engine.is_finished(one), poll_seconds=0)
    assert {name for _, name in engine.calls} == {"mix"}


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    file.write_text(json.dumps({"is": {}, "calls": [], "scripts": {}}))
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(GCLOUD.format(python=sys.executable, file=str(file)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return file


def test_a_queued_resource_that_was_taken_away_is_asked_for_again(gcloud):
    backend = QueuedResources(Place("gs://b", "p", source="URL", zone="z"))
    read = lambda: json.loads(gcloud.read_text())  # noqa: E731
    created = lambda: sum(call[3] == "create" for call in read()["calls"])  # noqa: E731
    backend.submit(job("a"))
    backend.submit(job("a"))
    backend.keep(job("a"))
    assert created() == 1, "a request that stands is left alone"
    gcloud.write_text(json.dumps(read() | {"is": {"p-a": "SUSPENDED"}}))
    backend.keep(job("a"))
    assert read()["is"] == {}
    backend.keep(job("a"))
    assert (created(), read()["is"]) == (2, {"p-a": "ACTIVE"})
    script = read()["scripts"]["p-a"]
    wait, delete = (
        script.index("until gcloud storage ls gs://b/runs/p/a/done.json"),
        script.index("queued-resources delete p-a"),
    )
    assert script.index("--only=a") < wait < delete, (
        "the slice must not be deleted before the stage's mark is written"
    )


def test_what_gcloud_refuses_is_told(gcloud):
    backend = QueuedResources(Place("gs://b", "p", source="URL", zone="z"))
    with pytest.raises(
        UserError, match="gcloud failed with exit status 1: ERROR: PERMISSION_DENIED"
    ):
        backend.submit(job("forbidden"))
    with pytest.raises(UserError, match="stage a has no TPU topology"):
        backend.submit(job("a", topology=""))


def test_a_tool_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="gcloud: not installed"):
        QueuedResources(Place("gs://b", "p", source="URL", zone="z")).submit(job("a"))


def test_topologies():
    slice_ = parse_topology("v5p:2x2x4")
    assert (slice_.kind, slice_.grid, slice_.chips, slice_.hosts) == ("v5p", "2x2x4", 16, 4)
    assert parse_topology("v6e:2x2").hosts == 1
    for wrong in ("v5p-8", "v7:2x2", "v5e:4", ""):
        with pytest.raises(UserError, match="is not a TPU topology"):
            parse_topology(wrong)
    with pytest.raises(UserError, match="no backend supports tpu7x"):
        parse_topology("tpu7x:2x2x1")


def test_jobs_of_a_pipeline(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    jobs = {
        one.name: one
        for one in jobs_of(
            "configs/btx.py",
            "/w",
            ("--config.rng_seed=1",),
            {"": "v5p:2x2x2", "finetune": "v5p:2x2x4"},
        )
    }
    assert set(jobs["mix"].needs) == {"expert_math", "expert_code", "expert_wiki"}
    assert (jobs["mix"].topology, jobs["finetune"].topology) == ("v5p:2x2x2", "v5p:2x2x4")
    assert jobs["mix"].command[-2:] == ("--config.rng_seed=1", "--only=mix")
    circle = tmp_path / "circle.py"
    circle.write_text(
        "from btx_jax.config.config import *\nfrom btx_jax.config.config_dict import to_config_dict\ndef"
        " get_config():\n    stage = lambda *needs: PipelineStage(Config('report',"
        " report=ReportConfig('x', {'a': 'b'})), needs)\n    return"
        " to_config_dict(Config('pipeline', pipeline={'a': stage('b'), 'b': stage('a')}))\n"
    )
    with pytest.raises(ConfigError, match="depend on each other in a cycle"):
        jobs_of(str(circle), "/w")
