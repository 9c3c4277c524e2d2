"""The live page: how it shows stages in every state, and that it is read-only."""

import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest

from btx_jax.commands.watch import serving
from btx_jax.errors import UserError
from btx_jax.reporting.live import Page, stages

NOW = 1_000_000.0
TRAIN = {"stage": "train", "train": {"steps": 10}}


def line(step, **values):
    given = {"lm_loss": 3.0 - step / 10, "tokens": 100.0, "tokens_per_second": 50.0}
    return {"step": step, **given, **values}


def begin(path, config, lines=(), age=1.0, done=False):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if lines:
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (path / "metrics.jsonl").write_text(text)
    if done:
        (path / "done.json").write_text("{}")
    for file in path.iterdir():
        os.utime(file, (NOW - age, NOW - age))


@pytest.fixture
def pipeline(tmp_path):
    """One stage in each state."""
    home = tmp_path / "my<b>run"
    needs = {
        "seed": [],
        "a": ["seed"],
        "b": ["seed"],
        "c": ["seed"],
        "mix": ["a", "b"],
        "export": ["seed", "a", "mix"],
        "report": ["seed"],
    }
    kinds = {name: {"stage": name} for name in ("mix", "export", "report")}
    recorded = {
        name: {"config": kinds.get(name, TRAIN), "needs": need} for name, need in needs.items()
    }
    begin(home, {"stage": "pipeline", "pipeline": recorded})
    begin(home / "seed", TRAIN, [line(10)], done=True)
    heldout = {"x": {"nats_per_token": 2.0}, "y": {"nats_per_token": 4.0}}
    measured = {
        "step": 0, "heldout": heldout, "heldout_mixed": heldout, "barrier": 0.2,
    }  # fmt: skip
    load = {"load": [[0.25, 0.75], [0.5, 0.5]]}
    begin(home / "a", TRAIN, [measured, line(1), line(2, routing=load)])
    begin(home / "b", TRAIN, [line(4)], age=10_000.0)
    return home


def test_every_stage_says_what_it_is_at(pipeline):
    told = {stage.name: stage for stage in stages(pipeline, NOW)}
    assert {name: stage.status for name, stage in told.items()} == {
        "seed": "finished",
        "a": "running",
        "b": "silent",
        "c": "ready",
        "mix": "waiting",
        "export": "waiting",
        "report": "ready",
    }
    assert told["mix"].waits == ("a", "b")
    assert told["export"].waits == ("mix",), "the mix waits for the others"
    a = told["a"]
    assert (a.step, a.steps, a.heldout, a.rate) == (2, 10, 3.0, 50.0)
    assert a.loss == pytest.approx(2.85) and a.left == pytest.approx(8 * 100 / 50)
    assert told["b"].heard == pytest.approx(10_000.0)


def test_a_run_alone_and_stages_of_jobs_and_nothing(pipeline, tmp_path):
    assert [stage.name for stage in stages(pipeline / "a", NOW)] == ["a"]
    (pipeline / "config.json").unlink()
    assert [stage.name for stage in stages(pipeline, NOW)] == ["a", "b", "seed"]
    assert stages(tmp_path / "nothing") == []


def test_the_page_shows_all_of_it_and_escapes_names(pipeline):
    page = Page(pipeline)
    whole = page.whole(5)
    assert "my&lt;b&gt;run" in whole and "my<b>run" not in whole
    body = page.body()
    for words in (
        "1 of 7 stages finished", "waiting for a, b", "2/10", "Training loss", "Held-out loss",
        "Mixing probe", "Routing load of a",
    ):  # fmt: skip
        assert words in body, words
    assert body.count("<svg") == 4
    assert page.body() == body


def test_figures_change_when_lines_come(pipeline):
    page = Page(pipeline)
    before = page.body()
    with (pipeline / "a" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(3)) + '\n{"step": 4, "lm_lo')  # an unfinished line
    assert page.body() != before and "3/10" in page.body()


@pytest.fixture
def url(pipeline):
    with serving(pipeline, "127.0.0.1", 0, 5.0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url, **options):
    request = urllib.request.Request(url, **options)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_it_is_served(url, pipeline):
    assert "<!doctype html>" in ask(f"{url}/")
    assert "of 7 stages finished" in ask(f"{url}/body")
    (pipeline / "report.html").write_text("the report")
    assert ask(f"{url}/report") == "the report"
    assert 'href="report"' in ask(f"{url}/body")


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/report", {}, 404),
        ("/config.json", {}, 404),
        ("/../../etc/passwd", {}, 404),
        ("/", {"method": "POST", "data": b""}, 501),
        ("/", {"headers": {"Host": "elsewhere.example"}}, 403),
    ],
)
def test_nothing_else_is(url, path, options, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url + path, **options)
    assert error.value.code == status


def test_a_page_that_closes_before_its_answer_comes_is_no_error(url, capfd):
    before = threading.active_count()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            browser.sendall(b"GET /body HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert "<!doctype html>" in ask(f"{url}/")
    while threading.active_count() > before:
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_what_cannot_be_served_is_told(pipeline, tmp_path):
    with pytest.raises(UserError, match="not a directory"), serving(tmp_path / "no", "::1", 0, 1):
        pass
    with (
        serving(pipeline, "127.0.0.1", 0, 5.0) as server,
        pytest.raises(UserError, match=r"cannot listen at 127\.0\.0\.1"),
        serving(pipeline, "127.0.0.1", server.server_port, 5.0),
    ):
        pass


def test_a_run_in_a_bucket_is_shown(pipeline, bucket):
    for file in sorted(pipeline.rglob("*")):
        if file.is_file():
            (bucket / file.relative_to(pipeline).as_posix()).write_bytes(file.read_bytes())
    told = {stage.name: stage for stage in stages(bucket)}
    statuses = {name: stage.status for name, stage in told.items()}
    assert statuses["seed"] == "finished" and statuses["mix"] == "waiting"
    assert statuses["a"] == "running" and told["a"].step == 2  # written a moment ago
    with serving(bucket, "127.0.0.1", 0, 5.0):
        assert "1 of 7 stages finished" in Page(bucket).body()
