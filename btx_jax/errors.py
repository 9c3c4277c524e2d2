"""Errors for users: one line that names the cause and the cure."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MAX_LINE = 8000
MAX_WORD = 100  # characters of a wrong word to compare with known ones
MAX_KNOWN = 40  # known words to list
MAX_TOLD = 20  # mistakes to report at once


class UserError(Exception):
    """Something the user can fix: the message is one line that names the cause and the cure. `btx`
    and `btx_jax.launch` print it without a traceback and exit with status 2."""


class ConfigError(UserError):
    """A config that cannot run: one or more mistakes, each of which starts with its key."""

    def __str__(self) -> str:
        if len(self.args) <= 1:
            return super().__str__()
        told = [*map(str, self.args)]
        if len(told) > MAX_TOLD:
            told = _by_what(told)
        listed = " ".join(f"({i}) {each}" for i, each in enumerate(told[:MAX_TOLD], start=1))
        more = len(told) - MAX_TOLD
        return f"{len(told)} mistakes: {listed}" + (f" and {more} more" if more > 0 else "")


def _by_what(told: list[str]) -> list[str]:
    """Mistakes, with those that say the same about several keys merged into one with their
    number."""
    places: dict[str, list[str]] = {}
    for each in told:
        key, _, what = each.partition(": ")
        places.setdefault(what, []).append(key)
    return [
        f"{first}{f' and {len(others)} more like it' if others else ''}: {what}"
        for what, (first, *others) in places.items()
    ]


class Mistakes:
    """Collects mistakes, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}  # in order, without duplicates

    def add(self, told: str) -> None:
        self.found[told] = None

    @contextlib.contextmanager
    def gather(self, prefix: str = "") -> Iterator[None]:
        """Context in which a UserError is collected, ending the block. prefix: put before
        incomplete keys."""
        try:
            yield
        except UserError as error:
            for told in map(str, error.args):
                self.add(told if told.startswith("config.") else prefix + told)

    def tell(self) -> None:
        """Raise ConfigError if there are any mistakes."""
        if self.found:
            raise ConfigError(*self.found)


def one_line(told: object) -> str:
    """An error's message on one line: control and unprintable characters are escaped, and an
    overlong line is cut in the middle."""
    words = " ".join(str(told).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return (
        line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
    )


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError, with the closest permitted word, for any other word."""
    if value not in allowed:
        raise ConfigError(f"{key}={value[:MAX_WORD]!r}: {suggest(value, allowed)}")


def suggest(word: object, known: Iterable[str]) -> str:
    known, word = tuple(known), str(word)[:MAX_WORD]
    begun = [other for other in known if word and other.startswith(word)]
    close = begun or difflib.get_close_matches(word, known[:1000], n=1)
    listed = ", ".join(known[:MAX_KNOWN]) + (", ..." if len(known) > MAX_KNOWN else "")
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + listed
