"""The help of every command, and shell completion."""

import itertools
import os
import re
import shlex
import subprocess
import sys

import click
import pytest

from btx_jax.cli.program import btx, run
from btx_jax.presets.registry import PRESETS
from tests.cli.arguments import arguments_of
from tests.conftest import ROOT


def commands(group=btx, words=()):
    """(words, command) of all commands, including those in groups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


COMMANDS = dict(commands())


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Independence of the terminal in which the tests run."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        run([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_tells_all_options_and_examples_that_are_commands(capsys, words):
    if words == ("lm-eval",):
        return  # its help is lm_eval's own
    command = COMMANDS[words]
    told = help_of(capsys, *words)
    flat = " ".join(told.split())
    assert f"Usage: btx {' '.join(words)} " in flat
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} says nothing"
        if isinstance(parameter, click.Option):
            assert all(name in told for name in parameter.opts)
    examples = told[told.index("─ Examples ─") :]
    assert f"│ btx {' '.join(words)} " in examples
    for example in re.sub(r"\\\n\s*", " ", command.examples).splitlines():
        (*_, behind) = example.partition("btx ")
        arguments_of(shlex.split(re.split(" >>? ", behind)[0]))


def test_no_option_has_an_underscore():
    names = itertools.chain.from_iterable(
        parameter.opts for command in COMMANDS.values() for parameter in command.params
    )
    assert not [name for name in names if name.startswith("-") and "_" in name]


def test_commands_are_told_by_sections_in_the_order_of_work(capsys):
    told = help_of(capsys)
    words = ("─ Train ─", "│ run ", "─ Mix and convert ─", "│ mix ", "─ Use and measure ─")
    words += ("│ generate ", "─ Cloud ─", "│ submit ", "─ Shell ─", "─ Options ─")
    places = [told.index(word) for word in words]
    assert places == sorted(places)
    for (name, *_), _ in commands():
        assert re.search(rf"│ {name} ", told)


@pytest.mark.parametrize("words", [["run"], ["run", "--help"]])
def test_presets_are_listed_with_a_line_each(capsys, words):
    with pytest.raises(SystemExit):
        run(words)
    told = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert re.search(rf"│ {name}[\[ ]", told)
        assert preset.told.split()[-1] in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mxi"], "No such command 'mxi'. Did you mean 'mix'?; see btx --help"),
        (["mix", "a"], "Missing argument 'OUT'; see btx mix --help"),
        (["mix", "a", "b", "c"], "Got unexpected extra argument (c); see btx mix --help"),
        (["expert", "ad"], "No such command 'ad'. Did you mean 'add'?; see btx expert --help"),
        (["generate", "x", "--top_p=1"], "No such option '--top_p'. (Did you mean"),
        (["generate", "x", "--prompt=a", "--top-p=0"], "0.0 is not in the range 0<x<=1; see btx"),
        (
            ["run", "demoo"],
            "CONFIG: no file demoo, and no preset; did you mean 'demo'? known: demo,",
        ),
        (["run", "math"], "did you mean 'math_expert'?"),
        (["run", "seed:huge"], "CONFIG: seed: huge: no such size; known: llama2_7b, "),
        (["run", "demo:x"], "CONFIG: demo: argument of get_config: takes no argument"),
        (["run", "my.py"], "CONFIG: no file my.py"),
        (["run", "demo", "--only"], "Option '--only' requires an argument; see btx run --help"),
        (["run", "demo", "--workdri=x"], "No such option '--workdri'. Did you mean '--workdir'?"),
        (["compile", "mix", "v5p:2x2x2"], "config.stage='mix': only training configs, such as"),
        (["submit", "--backend=local", "--pipeline=seed"], "its stage is 'train', not 'pipeline'"),
        (["report", "a", "b"], "--out: missing; name a directory for the report on several runs"),
        (["report", "a"], "WORKDIRS: "),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else " ".join(x),
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(words)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert captured.err.startswith("btx_jax: error: ") and captured.err.count("\n") == 1
    assert told in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_for_shells_ask_the_program(capsys, shell):
    run(["completion", shell])
    script = capsys.readouterr().out
    assert f"_BTX_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("btx m", {"plain,mix"}),
        ("btx expert ", {"plain,add", "plain,drop"}),
        ("btx run mat", {"plain,math_expert", "file,mat"}),
        ("btx submit --pipeline de", {"plain,demo", "plain,dense", "file,de"}),
        ("btx convert tes", {"file,tes"}),
        ("btx generate x --to", {"plain,--top-p"}),
        ("btx mix a b --format ", {"plain,huggingface", "plain,btx_jax"}),
    ],
)
def test_commands_options_presets_and_paths_are_completed(monkeypatch, capsys, words, expected):
    monkeypatch.setenv("_BTX_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        run([])
    assert set(capsys.readouterr().out.split()) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [("btx run mat", "math_expert"), ("btx conv", "convert"), ("btx run no_such", "")],
)
def test_bash_itself_completes(tmp_path, words, expected):
    program = tmp_path / "btx"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m btx_jax "$@"\n')
    program.chmod(0o755)
    *_, last = words.split()
    script = (
        'eval "$(btx completion bash)"; compopt() { :; }\n'
        f"COMP_WORDS=({words}) COMP_CWORD={words.count(' ')}\n"
        f"_btx_completion btx {last} x; echo ${{COMPREPLY[@]}}"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom btx_jax.cli.program import run\n"
        "try: run(['run', '--help'])\nfinally: print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"jax", "numpy", "orbax", "absl", "transformers"} & set(done.stderr.split())
