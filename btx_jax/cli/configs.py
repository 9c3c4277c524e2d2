"""Commands that take a config, by file or preset name, with overrides."""

import re
from collections.abc import Sequence
from typing import Any

import rich_click as click
from click.shell_completion import CompletionItem
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from btx_jax.cli.parts import Command, Where
from btx_jax.presets.registry import PRESETS, SIZES

CONFIG_TOLD = "a preset (`btx run` lists them) or a config file, with its argument after a colon"


class ConfigName(Where):
    """Parameter type of a config file or a preset's name."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = [
            CompletionItem(name, help=preset.told)
            for name, preset in PRESETS.items()
            if name.startswith(incomplete)
        ]
        # Files come first: click's bash script discards the items that precede a file item.
        return [*super().shell_complete(ctx, param, incomplete), *names]


CONFIG = ConfigName()


class WithOverrides(Command):
    """A command that accepts `--config.KEY=VALUE` anywhere among its arguments."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, options_metavar="[OPTIONS] [--config.KEY=VALUE]...", **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        others, overrides = split_overrides(args)
        ctx.params["overrides"] = overrides
        return super().parse_args(ctx, others)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into (other words, overrides). An override is `--config.KEY=VALUE`, or
    `--config.KEY` followed by VALUE."""
    others: list[str] = []
    overrides: list[str] = []
    is_open = False
    for word in words:
        is_override = re.match("--?(no)?config[.]", word) is not None
        is_value = is_open and not word.startswith("-")
        (overrides if is_override or is_value else others).append(word)
        is_open = is_override and "=" not in word
    return others, overrides


class TellsPresets(WithOverrides):
    """A command whose help ends with a list of the presets."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        formatter.write(Panel(presets(), title="Presets", title_align="left"))


def presets() -> Group:
    """A table of the presets, with the argument that each accepts."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, preset in PRESETS.items():
        shown = Text(name, "cyan")
        if preset.argument:
            shown.append(f"[:{preset.argument}]", "dim")
        table.add_row(shown, preset.told)
    return Group(table, Text(f"\n{SIZES}"))
