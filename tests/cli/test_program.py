"""Commands with arguments that nobody should give: they exit with status 2 and one line, and leave
nothing behind."""

import os
import subprocess
import sys

import pytest

from btx_jax.cli.program import run
from tests.conftest import ROOT

ODD = [
    *("/nowhere", "/tmp", "binary", "empty", "pipe", "/dev/zero", "", "a" * 5000, "\udcff", "loop"),
    *("loop/x", "~nobody-at-all/x", "$UNSET_HERE/x", "gs://bucket/x", "org/name", "binary/x", "*"),
]
COMMANDS = [
    "digest {}",
    "run {}",
    "compile {} v5p:2x2x2",
    "report {} --out out",
    "submit --backend local --pipeline {}",
    "generate {} --prompt x",
    "convert {} out",
    "mix {} out",
    "expert add {} {} out",
    "expert drop {} 0 out",
    "adapter export {} out",
    "adapter import {} {} out",
    "adapter merge {} out",
    "evaluate {} --out out",
    "evaluate x=y --tasks {} --out out",
    "nonsense {}",
]
NUMBERS = [
    *("generate x --prompt p --max-tokens={}", "generate x --prompt p --temperature={}"),
    *("generate x --prompt p --top-p={}", "generate x --prompt p --seed={}"),
    *("evaluate a=b --limit={} --out out", "evaluate a=b --batch-size={} --out out"),
    *("expert drop x {} out", "expert add x y out --router-std={}"),
    *("adapter merge x out --expert={}", "tokenizer empty --vocab-size={} --out out.model"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "empty").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BTX_DATA_DIR", str(tmp_path / "data"))
    # The time that gcsfs waits before it retries an unreachable bucket.
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)
    return tmp_path


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("btx_jax: error: "), error
    assert len(lines[0]) < 9000
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_paths(here, capsys, command):
    before = sorted(here.iterdir())
    for odd in ODD:
        refused(capsys, [word.replace("{}", odd) for word in command.split()])
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("command", NUMBERS)
def test_odd_numbers(here, capsys, command):
    before = sorted(here.iterdir())
    for odd in ("-1", "0", "1.5", "9" * 30, "9" * 6000, "nan", "inf", "x", "", "1e400"):
        refused(capsys, [word.replace("{}", odd) for word in command.split()])
    assert sorted(here.iterdir()) == before


def test_a_tokenizer_is_trained_on_several_files_however_they_are_named(here, capsys):
    for name in "abc":
        (here / f"{name}.txt").write_text(f"{name * 3} words of file {name} " * 50)
    made = {}
    for target, files in {
        "1": ["a.txt", "b.txt", "c.txt"],
        "2": ["a.txt,b.txt", "c.txt"],
        "3": ["*.txt"],
    }.items():
        run(["tokenizer", *files, "--vocab-size=275", f"--out=deep/{target}.model"])
        made[target] = (here / "deep" / f"{target}.model").read_bytes()
    assert made["1"] == made["2"] == made["3"]
    assert "FILES: no file matches 'd.txt'" in refused(
        capsys, ["tokenizer", "a.txt", "d.txt", "--out=new/4.model"]
    )
    assert not (here / "new").exists()


def test_a_reader_that_goes_away_ends_a_command_quietly():
    command = f"{sys.executable} -m btx_jax --help | true; echo ${{PIPESTATUS[0]}}"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "dumb"}  # no HOME
    done = subprocess.run(
        ["bash", "-c", f"sleep 0.1; {command}"], env=environment, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_what_cannot_be_printed_is_escaped(here):
    (here / "a.txt").write_text("some words " * 100)
    command = [sys.executable, "-m", "btx_jax", "tokenizer", "a.txt", "--vocab-size=280"]
    done = subprocess.run(
        [*command, os.fsdecode(b"--out=\xff.model")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote \\udcff.model\n"
