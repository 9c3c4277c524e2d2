import io
import logging

import numpy as np
import pytest
from rich.table import Table
from rich.text import Text

from btx_jax import terminal

HOSTILE = "\x1b[2J\x1b]0;title\x07a\rb\x9b31m\u202etxt\u2066\x7f\x08"
SHOWN = r"\x1b[2J\x1b]0;title\x07a\rb\x9b31m\u202etxt\u2066\x7f\x08"


def test_control_characters_are_shown():
    assert terminal.plain(HOSTILE) == SHOWN
    assert terminal.plain("naïve\tΔ 漢字 🙂\n") == "naïve\tΔ 漢字 🙂\n"


def test_errors_are_one_line_without_control_characters(capsys):
    terminal.error(f"no file {HOSTILE.replace(chr(13), '')}\nhere")
    told = capsys.readouterr().err
    assert told.startswith("btx_jax: error: no file \\x1b[2J") and told.endswith(" here\n")
    assert told.count("\n") == 1 and told[:-1].isprintable()


def test_log_lines_hold_no_control_characters():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        terminal.log_to(stream, logging.INFO)
        logging.getLogger("x").info("%s\nsecond", HOSTILE)
    finally:
        root.handlers[:], root.level = before
    assert stream.getvalue() == f"{SHOWN}\nsecond\n"


@pytest.mark.parametrize("name", ["[/red]", "[red]x", "[/]", ":smile:", "\\[x]", HOSTILE])
def test_tables_show_names_as_they_are(name):
    stream = io.StringIO()
    console = terminal.Console(file=stream, width=200, force_terminal=True)
    table = Table(name, title=name)
    table.add_row(name)
    table.add_row(Text("1.0", "bold"))
    console.print(table)
    console.print(name)
    assert stream.getvalue().count(terminal.plain(name)) == 4
    assert "\x1b[1m" in stream.getvalue(), "styles still are"
    assert "\x1b[2J" not in stream.getvalue() and "\x07" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (2e6, "23.1 d"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_in_the_unit_one_thinks_of(seconds, told):
    assert terminal.duration(seconds) == told


def test_one_thing_is_no_plural():
    told = [terminal.counted(count, "step") for count in (0, 1, 2, np.int64(2_000))]
    assert told == ["0 steps", "1 step", "2 steps", "2,000 steps"]


def test_sizes_are_in_powers_of_1024():
    assert [terminal.size(x) for x in (512, 3 * 2**20, 5 * 2**30)] == [
        "0 KiB",
        "3.00 MiB",
        "5.00 GiB",
    ]
