"""Commands that use, measure or check a checkpoint."""

import os
import sys
from pathlib import Path

import rich_click as click

from btx_jax import terminal
from btx_jax.cli.parts import (
    CHECKPOINT,
    NOT_NEGATIVE,
    SEED,
    USE,
    WHERE,
    HandedOver,
    Light,
    Number,
    command,
    text,
)
from btx_jax.errors import UserError

SAMPLING = "Sampling"
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="dtype of weights and activations",
)


@command(
    panel=USE,
    examples="""
btx generate runs/demo/finetune --prompt "def fibonacci(n):"
btx generate org/name --chat --prompt "Who wrote Faust?" --temperature=0.8
""",
)
@click.argument("checkpoint", type=WHERE, help=CHECKPOINT)
@click.option("--prompt", required=True, metavar="TEXT", help="text to continue")
@click.option(
    "--chat",
    is_flag=True,
    help="treat the prompt as a user message in the tokenizer's chat template",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=64,
    help="maximum number of new tokens",
)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="string that ends the text; may be repeated"
)
@click.option(
    "--temperature", panel=SAMPLING, type=NOT_NEGATIVE, metavar="T", default=0.0, help="0 is greedy"
)
@click.option(
    "--top-p",
    panel=SAMPLING,
    type=Number(0, 1, min_open=True),
    metavar="P",
    default=1.0,
    help="nucleus sampling: keep the most likely tokens up to this probability",
)
@click.option("--seed", panel=SAMPLING, type=SEED, metavar="N", default=0, help="random seed")
@DTYPE
def generate(
    checkpoint: str,
    prompt: str,
    chat: bool,
    max_tokens: int,
    stop: tuple[str, ...],
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str,
) -> None:
    """Sample text from a checkpoint."""
    from btx_jax.commands.generate import generate as sample
    from btx_jax.evaluation.generation import Sampling

    said = iter(["" if chat else prompt])  # printed once, before the first generated text
    shown = terminal.plain if sys.stdout.isatty() else str  # files get the text unescaped
    sample(
        checkpoint,
        prompt,
        lambda text: print(shown(next(said, "") + text), end="", flush=True),
        is_chat=chat,
        max_tokens=max_tokens,
        stop=stop,
        sampling=Sampling(temperature, top_p),
        seed=seed,
        dtype=dtype,
    )
    print()


@command(
    panel=USE,
    examples="""
btx evaluate runs/demo org/name --out=results
btx evaluate a=runs/mine b=org/name --tasks=gsm8k --limit=100 --out=results
""",
)
@click.argument(
    "models", metavar="[NAME=]CHECKPOINT...", type=WHERE, nargs=-1, required=True, help=CHECKPOINT
)
@click.option(
    "--tasks",
    metavar="TASK,TASK...",
    default="arc_easy,piqa",
    help=(
        "from arc_easy, piqa, openbook_qa, commonsense_qa, gsm8k, humaneval; read from"
        " $BTX_DATA_DIR/evals"
    ),
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    help="number of items per task, starting at the first; 0 for all",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", default=8, help="prompts per batch"
)
@DTYPE
@click.option(
    "--out",
    type=WHERE,
    required=True,
    metavar="DIR",
    help="directory for results.json and all answers; run the same command to resume",
)
def evaluate(
    models: tuple[str, ...], tasks: str, limit: int, batch_size: int, dtype: str, out: str
) -> None:
    """Evaluate checkpoints on test sets, side by side."""
    from btx_jax import stages
    from btx_jax.paths import to_path
    from btx_jax.presets import recipes

    named = dict(
        pair.partition("=")[::2] if "=" in pair else (Path(os.path.abspath(pair)).name, pair)
        for pair in models
    )
    if len(named) < len(models):
        raise UserError("two checkpoints have the same name; give each its own: NAME=CHECKPOINT")
    config = recipes.tasks(named, tuple(tasks.split(",")), limit, dtype, batch_size)
    stages.run(config, to_path(out, "--out"))


@command(
    "lm-eval",
    cls=HandedOver,
    panel=USE,
    add_help_option=False,
    options_metavar="[OPTIONS of lm_eval]...",
)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness with btx_jax's model class."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import btx_jax.evaluation.lm_eval_model  # noqa: F401  registers the model
    except ImportError as error:
        raise UserError(
            f"lm_eval cannot be imported ({error}); pip install 'btx_jax[lm-eval]'"
        ) from error
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except OSError as error:  # a missing data set, or an unwritable cache
        raise UserError(f"lm_eval: {error}") from error


@command(
    panel=USE,
    examples="""
btx report runs/demo
btx report runs/demo runs/demo-1 runs/demo-2 --out=runs/three
btx report runs/my_btx runs/my_ffn --side-by-side --out=runs/both
""",
)
@click.argument(
    "workdirs",
    type=WHERE,
    nargs=-1,
    required=True,
    help="directory of a pipeline, or of its evaluate stage",
)
@text(
    "--out",
    type=WHERE,
    metavar="DIR",
    help="directory for the report; for a single run, by default the run's directory",
)
@click.option(
    "--side-by-side",
    is_flag=True,
    help="the runs are different runs on the same held-out text, rather than one run with"
    " several seeds",
)
def report(workdirs: tuple[str, ...], out: str, side_by_side: bool) -> None:
    """Write a report of a finished run, of one run with several seeds, or of different runs.

    Writes report.html (one file, no network) and summary.json from the files of the runs. With
    several seeds, the curves and routing of the first are shown, and the arms are compared in pairs
    (comparison.md). Side by side, every model is listed under its run's name.
    """
    from btx_jax.stages import report

    if not out and len(workdirs) > 1:
        raise UserError("--out: missing; name a directory for the report on several runs")
    if side_by_side and len(workdirs) < 2:
        raise UserError("--side-by-side: needs two or more runs; name them")
    write = report.side_by_side if side_by_side else report.report
    terminal.say(f"wrote {write(workdirs, out or workdirs[0])}")


@command(
    cls=Light,
    panel=USE,
    examples="""
btx watch runs/demo
btx watch gs://bucket/runs/my_btx --every=30
""",
)
@click.argument("run", metavar="RUN", type=WHERE, help="directory of a pipeline or a run")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8600,
    help="port of the page; 0 for any free port",
)
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    help="address to listen at; 0.0.0.0 serves every machine that can reach this one",
)
@click.option(
    "--every",
    type=Number(min=1),
    default=5.0,
    metavar="SECONDS",
    help="interval between refreshes",
)
def watch(run: str, port: int, host: str, every: float) -> None:
    """Show a run in your browser while it runs, here or in a bucket.

    The page shows every branch's curve, held-out losses, the mixing probe, routing load, where time
    is spent, and which stages are finished, running or waiting. The run's directory is only read.
    """
    from btx_jax.commands.watch import run as serve
    from btx_jax.paths import to_path

    serve(to_path(run, "RUN").absolute(), host, port, every)


@command(panel=USE, examples="btx digest runs/demo/finetune")
@click.argument("checkpoint", type=WHERE, help=CHECKPOINT)
def digest(checkpoint: str) -> None:
    """Print the fingerprint of a checkpoint: sha256 over all its parameters."""
    from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params

    print(digest(load_params(find_checkpoint(checkpoint))))


@command(
    panel=USE,
    examples="""
btx verify runs/demo
btx verify mixture
""",
)
@click.argument("path", type=WHERE, help="a pipeline's directory (all its runs), or " + CHECKPOINT)
def verify(path: str) -> None:
    """Read everything that is stored and compare it with its checksums.

    Exits with status 1 if anything is damaged.
    """
    from btx_jax.commands.verify import verify as findings

    wrong = 0
    for finding in findings(path):
        wrong += not finding.good
        terminal.say(f"{'ok     ' if finding.good else 'DAMAGED'} {finding.name}: {finding.told}")
    if wrong:
        sys.exit(1)
