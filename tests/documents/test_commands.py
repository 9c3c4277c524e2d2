"""Every command in README.md and docs/ is listed in how.py, is valid for the program it calls, and
runs where possible."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from btx_jax.cli.program import run
from btx_jax.config.config import Config
from btx_jax.presets.config_file import read_config
from tests.cli.arguments import arguments_of
from tests.conftest import ROOT
from tests.documents import world
from tests.documents.how import ELSEWHERE, QUICK, SLOW, how, is_run, stand_in
from tests.documents.pages import PAGES, Command, commands, languages

COMMANDS = commands()
TEXTS = list(dict.fromkeys(command.text for command in COMMANDS))
OURS = [text for text in TEXTS if text.startswith("btx ")]
PYTHON = [text for text in TEXTS if re.match(r"python (-m )?(benchmarks|tests)\b", text)]


def words_of(text: str) -> list[str]:
    return Command("", text).words


def test_every_command_is_named_once_and_nothing_else_is():
    patterns = {text: how(text) for text in TEXTS}
    assert {text: found for text, found in patterns.items() if len(found) != 1} == {}
    matched = {pattern for found in patterns.values() for pattern in found}
    assert {*QUICK, *SLOW, *ELSEWHERE} - matched == set(), "patterns of no command"


def test_every_block_says_what_it_is():
    known = {"bash", "bibtex", "python", "text", "yaml"}
    assert [block for block in languages() if block[1] not in known] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("documents")
    world.make(folder, tokenizer_file)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setenv("BTX_DATA_DIR", str(made / "data"))
    return made


def config_of(words: list[str]) -> Config | None:
    """The config of a btx command that takes one, without checkpoints that do not exist here."""
    given = arguments_of(words)
    named = given.get("config") or given.get("pipeline")
    if not named:
        return None
    if named.endswith(".py") and not Path(named).exists():  # another command creates it
        return None
    preset, _, init = named.partition(":from_init,")
    if init and not Path(init).exists():
        named = f"{preset}:from_init"
    return read_config(named, given["overrides"], "CONFIG")


@pytest.mark.parametrize("text", OURS)
def test_our_commands_are_understood(here, text):
    config_of(words_of(text)[1:])


@pytest.mark.parametrize("text", [text for text in TEXTS if "-m btx_jax.launch" in text])
def test_commands_of_launch_are_understood(monkeypatch, text):
    """Their flags have the names of the options of `btx compile`."""
    given = dict(word.removeprefix("--").split("=", 1) for word in words_of(text)[3:])
    overrides = [f"--{key}={value}" for key, value in given.items() if key.startswith("config.")]
    own = {key for key in given if not key.startswith("config")}
    assert own <= {"compile_topology", "num_slices"}
    monkeypatch.chdir(ROOT)
    read_config(given["config"], overrides)


class Parsed(BaseException):
    """Raised once arguments have been parsed."""


@pytest.mark.parametrize("text", PYTHON)
def test_arguments_of_scripts_are_parsed(monkeypatch, text):
    _, *words = words_of(text)
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    script = ROOT / words[0]
    assert script.is_file()
    if "argparse" not in script.read_text():
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given, **named):
        parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def test_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for text in TEXTS:
        if text.startswith("make "):
            assert f"\n{text.removeprefix('make ')}:" in makefile


@pytest.fixture(scope="module")
def finished(made):
    world.stand_ins(made)
    return made


QUICK_PAGES = sorted({c.page for c in COMMANDS if is_run(c.text, QUICK)})


@pytest.mark.parametrize("page", QUICK_PAGES)
def test_quick_commands_run(here, finished, tmp_path, monkeypatch, page):
    monkeypatch.chdir(world.page_folder(finished, page, tmp_path / "page"))
    for command in COMMANDS:
        if command.page == page and is_run(command.text, QUICK):
            run(command.words[1:])


@pytest.mark.slow
@pytest.mark.cli
def test_all_commands_run_with_few_steps(tmp_path, tokenizer_file, monkeypatch):
    """As readers would type them: each page in its own directory, all with the same runs/."""
    made = tmp_path / "world"
    made.mkdir()
    world.make(made, tokenizer_file)
    monkeypatch.setenv("BTX_DATA_DIR", str(made / "data"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
    }
    wrong = []
    first = ["README.md", "getting-started.md"]  # others use their results
    pages = sorted((page.name for page in PAGES), key=lambda name: (name not in first, name))
    for page in pages:
        folder = world.page_folder(made, page, tmp_path / page)
        monkeypatch.chdir(folder)
        for command in COMMANDS:
            text = stand_in(command.text)
            if command.page != page or not is_run(text, (*QUICK, *SLOW)):
                continue
            words = words_of(text)[1:]
            done = subprocess.run(
                [sys.executable, "-m", "btx_jax", *words, *few_steps(words)],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                wrong.append(f"{page}: {command.text}\n{done.stderr[-1000:]}")
    assert not wrong, "\n\n".join(wrong)


def few_steps(words: list[str]) -> Iterator[str]:
    """Overrides with which a command takes only a moment."""
    config = config_of(words)
    if config is None or "--dry-run" in words:
        return
    yield from _few(config, "--config")
    for name, stage in (config.pipeline or {}).items():
        yield from _few(stage.config, f"--config.pipeline.{name}.config")


def _few(config: Config, key: str) -> Iterator[str]:
    if config.train:
        for setting in ("steps=2", "warmup_steps=1", "eval_rows=2"):
            yield f"{key}.train.{setting}"
    if config.profile.steps:
        yield f"{key}.train.steps=13"
    if config.evaluate:
        yield f"{key}.evaluate.rows=2"
