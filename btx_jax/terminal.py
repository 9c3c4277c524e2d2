"""Output to a terminal: log lines, errors, tables. Control characters in names, paths and texts,
which could manipulate the terminal, are escaped."""

import logging
import math
import re
import sys
from typing import Any, TextIO

import rich.console
from rich.text import Text

# C0 except tab and newline, DEL, C1, and bidirectional overrides
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """The text with control characters escaped as in Python: \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit; `?` if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Format a number of bytes, in powers of 1024."""
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {name}"
    return f"{count / 1024:.0f} KiB"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: `1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(message: str) -> None:
    """Print a line to stdout."""
    print(plain(message))


def error(message: object) -> None:
    """Print `btx_jax: error: ...` to stderr, on one line."""
    print(f"btx_jax: error: {plain(' '.join(str(message).split()))}", file=sys.stderr)


def warn(message: str) -> None:
    """Print `btx_jax: warning: ...` to stderr."""
    print(f"btx_jax: warning: {plain(message)}", file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to(stream: TextIO, level: int) -> None:
    """Send log messages of `level` and above, without prefixes, to the stream and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class Console(rich.console.Console):
    """A console that prints strings literally: no markup, no control characters. Styles are passed
    as Text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)
