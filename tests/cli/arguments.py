"""Parsing of a `btx` command line as the program does it."""

from collections.abc import Sequence
from typing import Any

import click

from btx_jax.cli.program import btx


def arguments_of(words: Sequence[str]) -> dict[str, Any]:
    """Parse the words after `btx` into the arguments of their command. Raises click.UsageError."""
    command: click.Command = btx
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        if name not in command.commands:
            raise click.UsageError(f"No such command {name!r}.")
        command = command.commands[name]
    return command.make_context(command.name, rest).params
