"""Text that is edited after a pipeline has prepared it."""

import json
import os

import pytest

from btx_jax import stages
from btx_jax.config.config import Config, DataConfig, PipelineStage
from btx_jax.errors import UserError
from btx_jax.stages import pipeline
from tests.conftest import sentences


@pytest.fixture
def text(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b"):
        rows = (json.dumps({"text": text}) + "\n" for text in sentences(30, seed=ord(name)))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "good.model").write_bytes(tokenizer_file.read_bytes())
    return folder


def config(length=64):
    """A pipeline of two stages that read the same text."""
    data = DataConfig("text/*.jsonl", tokenizer="good.model", sequence_length=length)
    first, second = Config("prepare", data=data), Config("prepare", data=data, rng_seed=1)
    return Config(
        "pipeline",
        pipeline={"prepare": PipelineStage(first), "later": PipelineStage(second, ("prepare",))},
    )


@pytest.fixture
def run(text, tmp_path):
    """The directory of a run that was interrupted after it had prepared its text."""
    stages.run(config(), tmp_path / "run", only="prepare")
    return tmp_path / "run"


def edit(text):
    """Change a letter: neither the size nor, by the clock alone, the time need tell."""
    file = text / "a.jsonl"
    first, *others = file.read_text()[::-1].partition("a")
    file.write_text("".join([first, "o", *others[1:]])[::-1])


def add(text):
    (text / "c.jsonl").write_text('{"text": "more"}\n')


def remove(text):
    (text / "b.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit, "text/a.jsonl has changed"),
        (add, "text/c.jsonl is new"),
        (remove, "text/b.jsonl is missing"),
    ],
)
@pytest.mark.parametrize("only", ["", "later"])
def test_a_run_is_not_resumed_on_other_text(text, run, change, told, only):
    change(text)
    with pytest.raises(UserError) as error:
        stages.run(config(), run, **({"only": only} if only else {}))
    assert str(error.value) == (
        f"{run}: {told}, but a run must keep the text it started with; restore it, choose another"
        f" --workdir, or delete {run} to start over"
    )
    assert not (run / "later").exists()


def test_text_that_is_edited_while_a_run_works_ends_it(text, tmp_path, monkeypatch):
    whole = stages.run

    def edited(*arguments):
        whole(*arguments)
        edit(text)

    monkeypatch.setattr(pipeline.stages, "run", edited)
    with pytest.raises(UserError, match=r"text/a\.jsonl has changed, but a run must keep"):
        pipeline.run(config(), tmp_path / "run")
    assert not (tmp_path / "run/later").exists()


def test_a_finished_run_tells_of_new_text_and_needs_none(text, run):
    stages.run(config(), run)
    edit(text)
    with pytest.raises(UserError, match="has changed"):
        stages.run(config(), run)
    for file in text.iterdir():
        file.unlink()
    stages.run(config(), run)


def test_only_text_that_looks_changed_is_read(text, run, monkeypatch):
    read = []
    whole = pipeline.changed_text.__globals__["_sha256"]

    def counted(file):
        read.append(file.name)
        return whole(file)

    monkeypatch.setitem(pipeline.changed_text.__globals__, "_sha256", counted)
    os.utime(text / "b.jsonl", (1, 1))  # touched, or copied without its times
    data = config().pipeline["prepare"].config.data
    files = json.loads((run / "prepare/done.json").read_text())["files"]
    assert pipeline.changed_text(data, files) == []
    assert read == ["b.jsonl"]
