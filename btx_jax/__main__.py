"""The short commands: python -m btx_jax
{digest,generate,convert,evaluate,mix,expert,adapter,verify,push,tokenizer,lm_eval} --help."""

from btx_jax import interrupts

if __name__ == "__main__":  # imports take seconds
    interrupts.end_at_once("run the same command again")

import argparse
import logging
import math
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pathlib import Path

from btx_jax import environment, terminal
from btx_jax.command_line import Parser, told_in_one_line
from btx_jax.errors import UserError
from btx_jax.output import none_left_empty
from btx_jax.paths import expand

DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINT = (
    "a run's directory, one of its checkpoints/STEP, a Hugging Face directory, an adapter's, or"
    " org/name[@REVISION] of the Hub"
)


def _digest(args: argparse.Namespace) -> None:
    from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params

    print(digest(load_params(find_checkpoint(args.checkpoint))))


def _generate(args: argparse.Namespace) -> None:
    from btx_jax.commands.generate import generate
    from btx_jax.evaluation.generation import Sampling

    said = iter(["" if args.chat else args.prompt])  # once, when there is something behind it
    shown = terminal.plain if sys.stdout.isatty() else str  # a file gets the text itself

    generate(
        args.checkpoint,
        args.prompt,
        lambda text: print(shown(next(said, "") + text), end="", flush=True),
        is_chat=args.chat,
        max_tokens=args.max_tokens,
        stop=args.stop,
        sampling=Sampling(args.temperature, args.top_p),
        seed=args.seed,
        dtype=args.dtype,
    )
    print()


def _convert(args: argparse.Namespace) -> None:
    from btx_jax.commands.convert import run

    terminal.say(run(args.source, args.target, args.dtype))


def _mix(args: argparse.Namespace) -> None:
    from btx_jax.commands.mix import run

    if not Path(args.recipe).is_file():  # nor a device or a pipe, which may have no end
        raise UserError(f"RECIPE.yml: no file {args.recipe}")
    run(
        args.recipe,
        args.target,
        dry_run=args.dry_run,
        verify=args.verify,
        output_format=args.format,
    )


def _expert_add(args: argparse.Namespace) -> None:
    from btx_jax.commands.experts import add

    terminal.say(
        add(args.mixture, args.source, args.target, router_std=args.router_std, seed=args.seed)
    )


def _expert_drop(args: argparse.Namespace) -> None:
    from btx_jax.commands.experts import drop

    terminal.say(drop(args.mixture, args.index, args.target))


def _adapter_export(args: argparse.Namespace) -> None:
    from btx_jax.commands.adapter import export

    terminal.say(export(args.source, args.target, args.format))


def _adapter_import(args: argparse.Namespace) -> None:
    from btx_jax.commands.adapter import import_peft

    terminal.say(import_peft(args.source, args.base, args.target))


def _adapter_merge(args: argparse.Namespace) -> None:
    from btx_jax.commands.adapter import merge

    terminal.say(merge(args.source, args.target, args.base, args.expert, args.gates))


def _verify(args: argparse.Namespace) -> None:
    from btx_jax.commands.verify import verify

    wrong = 0
    for finding in verify(args.path):
        wrong += not finding.good
        terminal.say(f"{'ok     ' if finding.good else 'DAMAGED'} {finding.name}: {finding.told}")
    if wrong:
        sys.exit(1)


def _tokenizer(args: argparse.Namespace) -> None:
    from btx_jax.data.sentencepiece_models import train_sentencepiece
    from btx_jax.data.sources import Problems, expand_files, parse_sources, read_documents

    problems = Problems()
    files = [
        (file, source.field)
        for notation in args.files
        for source in parse_sources(notation, "FILES")
        for file in expand_files(source, "FILES")
    ]
    texts = (text for file, field in files for text in read_documents(file, field, problems))
    out = Path(args.out)
    with none_left_empty(out.parent):
        train_sentencepiece(texts, args.vocab_size, out)
    for line in problems.lines():
        logging.warning(line)
    terminal.say(f"wrote {args.out}")


def _push(args: argparse.Namespace) -> None:
    from btx_jax.commands.push import push

    told = push(
        args.directory,
        args.repository,
        is_private=args.private,
        revision=args.revision,
        message=args.message,
    )
    terminal.say(told)


def _evaluate(args: argparse.Namespace) -> None:
    from btx_jax import stages
    from btx_jax.presets import recipes

    models = dict(
        pair.partition("=")[::2] if "=" in pair else (Path(os.path.abspath(pair)).name, pair)
        for pair in args.models
    )
    if len(models) < len(args.models):
        raise UserError("two checkpoints have the same name; name them: NAME=CHECKPOINT")
    config = recipes.tasks(
        models, tuple(args.tasks.split(",")), args.limit, args.dtype, args.batch_size
    )
    stages.run(config, Path(expand(args.out, "--out")))


def _lm_eval(arguments: list[str]) -> None:
    """Hands over to lm-evaluation-harness, which reads its own arguments from sys.argv."""
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
    except OSError as error:  # a data set that is not there, a cache that cannot be written
        raise UserError(f"lm_eval: {error}") from error


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must lie in (0, 1]")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be finite and not negative")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError("must lie in [0, 2**32)")
    return value


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m btx_jax",
        description="Short commands; to train, see python -m btx_jax.launch --help.",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("digest", help="sha256 over all parameters of a checkpoint")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    command.set_defaults(run=_digest)

    command = commands.add_parser("generate", help="sample text from a checkpoint")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    command.add_argument("--prompt", required=True)
    command.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, for the tokenizer's chat template",
    )
    command.add_argument("--max_tokens", type=int, default=64, help="new tokens at most (64)")
    command.add_argument(
        "--stop", action="append", default=[], help="a string that ends the text; may be repeated"
    )
    command.add_argument(
        "--temperature", type=_not_negative, default=0.0, help="0 (the default) is greedy"
    )
    command.add_argument(
        "--top_p",
        type=_fraction,
        default=1.0,
        help="nucleus: keep the likeliest tokens up to this probability (1)",
    )
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations (float32)",
    )
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "convert", help="Hugging Face directory -> checkpoint of ours, or back"
    )
    command.add_argument("source", metavar="SRC", help=CHECKPOINT)
    command.add_argument("target", metavar="DST", help="a new directory")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="",
        help="of the result; by default each tensor keeps its own",
    )
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "evaluate",
        help=(
            "test sets on checkpoints: arc_easy, piqa, openbook_qa, commonsense_qa, gsm8k,"
            " humaneval"
        ),
    )
    command.add_argument("models", metavar="[NAME=]CHECKPOINT", nargs="+", help=CHECKPOINT)
    command.add_argument(
        "--tasks",
        default="arc_easy,piqa",
        help="comma-separated (arc_easy,piqa); read from $BTX_DATA_DIR/evals",
    )
    command.add_argument(
        "--limit", type=int, default=0, help="only the first items of each; 0 (the default) for all"
    )
    command.add_argument("--dtype", choices=DTYPES[:2], default="float32")
    command.add_argument("--batch_size", type=int, default=8)
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="results.json and every answer; run again to go on",
    )
    command.set_defaults(run=_evaluate)

    command = commands.add_parser(
        "mix",
        help="dense models -> one Mixture-of-Experts, from a recipe (a mergekit-moe YAML is one)",
    )
    command.add_argument("recipe", metavar="RECIPE.yml")
    command.add_argument("target", metavar="OUT", help="a new directory")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="read the output again and compare every tensor with its sources",
    )
    command.add_argument(
        "--format",
        choices=("huggingface", "btx_jax"),
        default="",
        help="of OUT; by default that of base_model",
    )
    command.set_defaults(run=_mix)

    expert = commands.add_parser(
        "expert",
        help="add an expert to a finished mixture, or drop one; all other weights keep their bits",
    )
    actions = expert.add_subparsers(dest="action", required=True, metavar="ACTION")
    command = actions.add_parser(
        "add", help="a dense model's feed-forwards become the last expert of every MoE layer"
    )
    command.add_argument("mixture", metavar="MIXTURE", help=CHECKPOINT)
    command.add_argument("source", metavar="SOURCE", help="the dense model: " + CHECKPOINT)
    command.add_argument("target", metavar="OUT", help="a new directory")
    command.add_argument(
        "--router_std", type=_not_negative, default=0.02, help="of the new router rows (0.02)"
    )
    command.add_argument("--seed", type=_seed, default=0)
    command.set_defaults(run=_expert_add)
    command = actions.add_parser(
        "drop", help="remove an expert and its router rows from every MoE layer"
    )
    command.add_argument("mixture", metavar="MIXTURE", help=CHECKPOINT)
    command.add_argument("index", metavar="INDEX", type=int, help="which expert, from 0")
    command.add_argument("target", metavar="OUT", help="a new directory")
    command.set_defaults(run=_expert_drop)

    adapters = commands.add_parser(
        "adapter", help="LoRA experts to and from files, and into the weights they stand beside"
    )
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    command = actions.add_parser(
        "export",
        help="a run's LoRA experts -> adapter.safetensors and adapter.json, or what peft reads",
    )
    command.add_argument("source", metavar="SRC", help="a run that trained LoRA experts")
    command.add_argument("target", metavar="DST", help="a new directory")
    command.add_argument(
        "--format",
        choices=("btx_jax", "peft"),
        default="btx_jax",
        help="peft: one expert a layer only",
    )
    command.set_defaults(run=_adapter_export)
    command = actions.add_parser("import", help="a LoRA that peft saved -> an adapter directory")
    command.add_argument("source", metavar="PEFT_DIR", help="with adapter_config.json")
    command.add_argument("base", metavar="BASE", help="the model it was trained on: " + CHECKPOINT)
    command.add_argument("target", metavar="DST", help="a new directory")
    command.set_defaults(run=_adapter_import)
    command = actions.add_parser(
        "merge", help="LoRA experts into the weights of their base -> a Hugging Face directory"
    )
    command.add_argument(
        "source", metavar="ADAPTER", help="a run that trained LoRA experts, or an adapter directory"
    )
    command.add_argument("target", metavar="DST", help="a new directory")
    command.add_argument(
        "--base", default="", help="where the base lies now, if not where it was in training"
    )
    command.add_argument(
        "--expert", type=int, default=None, help="of several: this one alone, in every layer"
    )
    command.add_argument(
        "--gates", default="", help="of several: `mean`, or one weight per expert, comma-separated"
    )
    command.set_defaults(run=_adapter_merge)

    command = commands.add_parser(
        "verify", help="read all of what is stored and compare it with its checksums"
    )
    command.add_argument(
        "path", metavar="PATH", help="a pipeline's directory (all its runs), or " + CHECKPOINT
    )
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "push", help="a Hugging Face directory -> a repository of the Hub"
    )
    command.add_argument(
        "directory",
        metavar="DIR",
        help="an export, a mixture, a merged model, or an adapter of peft",
    )
    command.add_argument("repository", metavar="ORG/NAME", help="made where it is missing")
    command.add_argument("--private", action="store_true", help="seen by you and your org alone")
    command.add_argument("--revision", default="", help="a branch, made where it is missing (main)")
    command.add_argument("--message", default="", help="of the commit")
    command.set_defaults(run=_push)

    command = commands.add_parser(
        "tokenizer", help="train a sentencepiece model that gives back any text exactly"
    )
    command.add_argument(
        "files",
        metavar="FILES",
        nargs="+",
        help=(
            "files or globs, as several arguments or comma-separated: text, .jsonl, .parquet, .gz,"
            " .zst; FILE#FIELD names a field"
        ),
    )
    command.add_argument("--vocab_size", type=int, default=32_000)
    command.add_argument("--out", required=True, metavar="FILE.model")
    command.set_defaults(run=_tokenizer)
    told = "lm-evaluation-harness: lm_eval --model btx_jax --model_args checkpoint=DIR --tasks ..."
    commands.add_parser("lm_eval", help=told, add_help=False)
    return made


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    terminal.log_to(sys.stderr, logging.WARNING)
    with told_in_one_line():
        environment.check()
        if argv[:1] == ["lm_eval"]:  # its arguments are its own
            _lm_eval(argv[1:])
            return
        args = parser().parse_args(argv)
        args.run(args)


if __name__ == "__main__":
    main()
