"""The program `btx`: its commands, and how it reports errors."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import cast

import rich_click as click
from click.exceptions import Exit, NoArgsIsHelpError
from click.shell_completion import get_completion_class, shell_complete

from btx_jax import __version__, environment, terminal
from btx_jax.cli import cloud, mix, new, train, use
from btx_jax.cli.parts import SHELL, Group, Light
from btx_jax.command_line import fail, told_in_one_line

NAME, COMPLETE = "btx", "_BTX_COMPLETE"


@click.group(cls=Group)
@click.version_option(__version__, prog_name=NAME)
def btx() -> None:
    """Branch-Train-MiX: train domain experts of a checkpoint separately, mix them into one
    Mixture-of-Experts, finetune it, and measure the gain.

    Start with `btx run demo`; every command has more help under --help.
    """


@btx.command(
    cls=Light,
    panel=SHELL,
    examples="""
btx completion bash >> ~/.bashrc
btx completion zsh >> ~/.zshrc
btx completion fish > ~/.config/fish/completions/btx.fish
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="your shell")
def completion(shell: str) -> None:
    """Print a script that completes commands, options, presets and paths in your shell."""
    made = get_completion_class(shell)
    assert made
    print(made(btx, {}, NAME, COMPLETE).source())


for command in (
    *(new.new, train.plan, train.run, train.compile_step),
    *(mix.mix, mix.convert, mix.expert, mix.adapter, mix.tokenizer),
    *(use.generate, use.evaluate, use.lm_eval, use.watch, use.report, use.digest, use.verify),
    *(cloud.submit, cloud.push),
):
    btx.add_command(command)


def run(words: Sequence[str]) -> None:
    """Run a command. An error prints one line on stderr and exits with status 2."""
    terminal.log_to(sys.stderr, logging.WARNING)
    with told_in_one_line():
        if asked := os.environ.get(COMPLETE):  # set by the script that `btx completion` prints
            sys.exit(shell_complete(btx, {}, NAME, COMPLETE, asked))
        environment.check()
        try:
            with btx.make_context(NAME, list(words)) as context:
                btx.invoke(context)
        except Exit as end:  # --help, --version
            sys.exit(end.exit_code)
        except NoArgsIsHelpError as error:
            print(error.format_message())
            sys.exit(error.exit_code)
        except click.UsageError as error:
            told = error.format_message().rstrip(".")
            fail(f"{told}{_expanded(told)}; see {_named(words)} --help")


def _expanded(told: str) -> str:
    """The cure if unexpected arguments are files, as when a shell expands a glob; else ""."""
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.+)\)", told)
    if extra and os.path.isfile(extra[1].split(" ")[0]):
        return (
            ": quote globs ('*.txt') so that the shell does not expand them, and separate"
            " files by commas"
        )
    return ""


def _named(words: Sequence[str]) -> str:
    """The name of the command that these words call."""
    named, command = NAME, cast(click.Command, btx)
    for word in words:
        if not isinstance(command, click.Group) or word not in command.commands:
            break
        named, command = f"{named} {word}", command.commands[word]
    return named
