"""What users are meant to read: one line that names cause and cure."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message is one line that names the cause and the cure.

    `btx_jax.launch` and `python -m btx_jax` print it without a traceback and exit with status 2.
    """


class ConfigError(UserError):
    """A config that cannot run. The message starts with the key."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError, with the nearest allowed word, for any other."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r}: {suggest(value, allowed)}")


def suggest(word: str, known: Iterable[str]) -> str:
    known = tuple(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)
