"""What goes out to a terminal: log lines, errors, tables. Control characters in names, paths and
texts, with which a terminal could be steered, are shown, not sent."""

import logging
import math
import re
import sys
from typing import Any, TextIO

import rich.console
from rich.text import Text

# C0 but tab and newline, DEL, C1, and what turns the direction of writing
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Control characters as Python writes them: \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def duration(seconds: float) -> str:
    """In the unit in which one thinks of it; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def say(message: str) -> None:
    """A line on stdout."""
    print(plain(message))


def error(message: object) -> None:
    """`btx_jax: error: ...` on stderr, on one line."""
    print(f"btx_jax: error: {plain(' '.join(str(message).split()))}", file=sys.stderr)


def warn(message: str) -> None:
    """`btx_jax: warning: ...` on stderr."""
    print(f"btx_jax: warning: {plain(message)}", file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to(stream: TextIO, level: int) -> None:
    """Log messages of `level` and above, bare, go to the stream and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class Console(rich.console.Console):
    """Strings are what they say: no markup, no control characters. Styles come as Text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)
