"""Progress bars on terminals, and none elsewhere."""

import logging
import os
import pty
import subprocess
import sys
import termios

import pytest

from btx_jax import progress
from tests.conftest import ROOT

CODE = """
import time
from btx_jax.progress import Steps, bar, clock
for _ in bar(range(3), desc="reading", shown={shown}): pass
with clock("thinking", {shown}): time.sleep(1.2)
with Steps("mine", 2, 4, {shown}) as steps:
    for _ in range(2): steps.update(dict(loss="1.5"))
"""


def on_a_terminal(shown):
    """The output on a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(shown=shown)]
    subprocess.run(command, env=environment, stderr=theirs, check=True)
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 4096):
            told += part
    except OSError:  # everything has been read
        pass
    os.close(ours)
    return told.decode()


def test_a_terminal_gets_bars_of_one_process():
    told = on_a_terminal(True)
    assert "reading: 100%" in told and "3/3" in told
    assert "thinking [00:00]" in told and "thinking [00:01]" in told
    assert "mine: 100%" in told and "4/4" in told and "loss=1.5" in told
    assert on_a_terminal(False) == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_file_gets_no_bars_but_a_line_a_minute_of_training(capfd, caplog, monkeypatch, shown):
    with caplog.at_level(logging.INFO):
        exec(CODE.format(shown=shown))
        assert not caplog.messages
        monkeypatch.setattr(progress, "SECONDS", 0)
        exec(CODE.format(shown=shown))
    assert caplog.messages == (["mine: step 3 of 4, loss 1.5, 00:00 left"] if shown else [])
    assert capfd.readouterr().err == ""
