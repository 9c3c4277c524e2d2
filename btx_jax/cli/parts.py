"""Building blocks of the `btx` commands: help with examples, arguments that a shell completes,
numbers in ranges.

This module and those that define commands import only what help and completion need; a command's
implementation is imported when it runs.
"""

import functools
import math
from typing import Any

import rich_click as click
from click.shell_completion import CompletionItem
from rich.panel import Panel
from rich.text import Text

CHECKPOINT = (
    "a run's directory, one of its checkpoints/STEP, a Hugging Face directory or an adapter's, here"
    " or at gs://..., or org/name[@REVISION] of the Hub"
)
HELP: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "rich_help_config": {
        "commands_before_options": True,
        "options_table_column_types": [
            "required",
            "opt_long",
            "opt_short",
            "metavar_short",
            "help",
        ],
    },
}


PANELS = TRAIN, MIX, USE, CLOUD, SHELL = (  # groups of commands in the help, in this order
    "Train",
    "Mix and convert",
    "Use and measure",
    "Cloud",
    "Shell",
)


class Light(click.RichCommand):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: str = "", **options: Any):
        """examples: one command per line; continuation lines are indented."""
        options["context_settings"] = HELP
        options["panels"] = [click.RichOptionPanel(name) for name in ("Arguments", "Options")]
        super().__init__(*args, **options)
        self.examples = examples.strip("\n")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self.examples:
            shown = Text(self.examples, overflow="fold")
            formatter.write(Panel(shown, title="Examples", title_align="left"))


class Command(Light):
    """A command that may use JAX."""

    def invoke(self, ctx: click.Context) -> Any:
        from btx_jax.parallel.accelerators import leave_absent_tpu

        leave_absent_tpu()
        return super().invoke(ctx)


command = functools.partial(click.command, cls=Command)
text = functools.partial(click.option, default="", show_default=False)  # default ""


class HandedOver(Command):
    """A command that passes all its arguments, including --help, to another program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = tuple(args)
        return []


class Group(click.RichGroup):
    command_class = Command

    def __init__(self, *args: Any, **options: Any):
        options["context_settings"] = HELP
        options["panels"] = [click.RichCommandPanel(name) for name in PANELS]
        super().__init__(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of their definition, most used first


class Where(click.ParamType):
    """Parameter type of a path, a Hub name or a URL. The code that reads it validates it."""

    name = ""  # the help has a separate column for it

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Number(click.FloatRange):
    """Parameter type of a finite number."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite.", param, ctx)
        return number


WHERE = Where()
SEED = click.IntRange(0, 2**32 - 1)
NOT_NEGATIVE = Number(min=0)
