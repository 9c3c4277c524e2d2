"""Commands that make a checkpoint from others: mix, convert, expert, adapter, tokenizer."""

import logging

import rich_click as click

from btx_jax import buckets, terminal
from btx_jax.cli.parts import CHECKPOINT, MIX, NOT_NEGATIVE, SEED, WHERE, Group, command, text
from btx_jax.errors import UserError
from btx_jax.paths import to_path

NEW = "a new directory"


@command(
    panel=MIX,
    examples="""
btx mix recipe.yml mixture --dry-run
btx mix recipe.yml mixture --verify
""",
)
@click.argument("recipe", type=WHERE, help="a YAML recipe; those of mergekit-moe work too")
@click.argument("out", type=WHERE, help=NEW)
@click.option("--dry-run", is_flag=True, help="check everything, print the plan, write nothing")
@click.option(
    "--verify",
    is_flag=True,
    help="read the output back and compare every tensor with its sources",
)
@click.option(
    "--format",
    type=click.Choice(["huggingface", "btx_jax"]),
    default=None,
    help="format of OUT; by default the format of base_model",
)
def mix(recipe: str, out: str, dry_run: bool, verify: bool, format: str | None) -> None:
    """Mix dense models into one Mixture-of-Experts model, following a recipe."""
    from btx_jax.commands.mix import run

    file = to_path(recipe, "RECIPE.yml")
    buckets.require(file, "RECIPE")
    if not file.is_file():  # excludes devices and pipes, which may never end
        raise UserError(f"RECIPE: {recipe} does not exist; check the path")
    run(recipe, out, dry_run=dry_run, verify=verify, output_format=format or "")


@command(
    panel=MIX,
    examples="""
btx convert org/name runs/start
btx convert runs/demo/finetune mixture --dtype=bfloat16
""",
)
@click.argument("src", type=WHERE, help=CHECKPOINT)
@click.argument("dst", type=WHERE, help=NEW)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=None,
    help="dtype of the result; by default each tensor keeps its dtype",
)
def convert(src: str, dst: str, dtype: str | None) -> None:
    """Convert a Hugging Face directory to a btx_jax checkpoint, or back."""
    from btx_jax.commands.convert import run

    terminal.say(run(src, dst, dtype or ""))


@click.group(panel=MIX, cls=Group)
def expert() -> None:
    """Add an expert to a finished mixture, or drop one; all other weights stay bit-identical."""


MIXTURE = click.argument("mixture", type=WHERE, help=CHECKPOINT)
OUT = click.argument("out", type=WHERE, help=NEW)


@expert.command(
    "add",
    examples="""
btx expert add mixture models/law larger --router-std=0.01
btx expert add mixture models/law larger --text='law/*.jsonl#body'
""",
)
@MIXTURE
@click.argument("source", type=WHERE, help="the dense model: " + CHECKPOINT)
@OUT
@click.option(
    "--router-std",
    type=NOT_NEGATIVE,
    metavar="STD",
    default=0.02,
    help="standard deviation of the new router rows",
)
@click.option(
    "--seed", type=SEED, metavar="N", default=0, help="random seed of the new router rows"
)
@text(
    "--text",
    metavar="FILES",
    help="text of the new expert's domain; required if the routers were solved in closed form,"
    " as all are solved again",
)
@text(
    "--statistics",
    type=WHERE,
    metavar="FILE",
    help="instead of --text: router statistics of that text, made elsewhere",
)
def expert_add(
    mixture: str,
    source: str,
    out: str,
    router_std: float,
    seed: int,
    text: str,
    statistics: str,
) -> None:
    """Add a dense model's feed-forwards as the last expert of every MoE layer."""
    from btx_jax.commands.experts import add

    told = add(
        mixture,
        source,
        out,
        router_std=router_std,
        seed=seed,
        text=text,
        statistics=statistics,
    )
    terminal.say(told)


@expert.command("drop", examples="btx expert drop mixture 2 smaller")
@MIXTURE
@click.argument("index", type=click.IntRange(min=0), help="index of the expert, from 0")
@OUT
def expert_drop(mixture: str, index: int, out: str) -> None:
    """Remove an expert and its router rows from every MoE layer."""
    from btx_jax.commands.experts import drop

    terminal.say(drop(mixture, index, out))


@click.group(panel=MIX, cls=Group)
def adapter() -> None:
    """Export, import and merge LoRA experts."""


DST = click.argument("dst", type=WHERE, help=NEW)


@adapter.command(
    "export",
    examples="""
btx adapter export runs/mola my_adapter
btx adapter export runs/lora for_peft --format=peft
""",
)
@click.argument("src", type=WHERE, help="a run that trained LoRA experts")
@DST
@click.option(
    "--format",
    type=click.Choice(["btx_jax", "peft"]),
    default="btx_jax",
    help="peft: requires one expert per layer",
)
def adapter_export(src: str, dst: str, format: str) -> None:
    """Export a run's LoRA experts to adapter.safetensors and adapter.json, or to peft's format."""
    from btx_jax.commands.adapter import export

    terminal.say(export(src, dst, format))


@adapter.command("import", examples="btx adapter import downloaded_lora org/base my_adapter")
@click.argument("peft_dir", type=WHERE, help="directory with adapter_config.json")
@click.argument("base", type=WHERE, help="the model it was trained on: " + CHECKPOINT)
@DST
def adapter_import(peft_dir: str, base: str, dst: str) -> None:
    """Convert a LoRA saved by peft to an adapter directory."""
    from btx_jax.commands.adapter import import_peft

    terminal.say(import_peft(peft_dir, base, dst))


@adapter.command(
    "merge",
    examples="""
btx adapter merge my_adapter merged --gates=mean
btx adapter merge runs/mola merged --expert=0
""",
)
@click.argument(
    "adapter",
    type=WHERE,
    help="a run that trained LoRA experts, or an adapter directory",
)
@DST
@text(
    "--base",
    type=WHERE,
    metavar="CHECKPOINT",
    help="new location of the base, if it has moved since training",
)
@click.option(
    "--expert",
    type=click.IntRange(min=0),
    metavar="INDEX",
    help="with several experts: merge only this one, in every layer",
)
@text(
    "--gates",
    metavar="mean|W,W...",
    help="with several experts: merge their mean, or their sum with one weight per expert,"
    " comma-separated",
)
def adapter_merge(adapter: str, dst: str, base: str, expert: int | None, gates: str) -> None:
    """Merge LoRA experts into the weights of their base, and write a Hugging Face directory."""
    from btx_jax.commands.adapter import merge

    terminal.say(merge(adapter, dst, base, expert, gates))


@command(
    panel=MIX,
    examples="""
btx tokenizer 'text/*.jsonl.gz' notes.txt --vocab-size=32000 --out=my.model
btx tokenizer rows.parquet#body --out=my.model
""",
)
@click.argument(
    "files",
    metavar="FILES...",
    type=WHERE,
    nargs=-1,
    required=True,
    help=(
        "files or globs, as several arguments or comma-separated: text, .jsonl, .parquet, .gz,"
        " .zst; FILE#FIELD names a field"
    ),
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), metavar="N", default=32_000, help="vocabulary size"
)
@click.option(
    "--out", type=WHERE, required=True, metavar="FILE.model", help="the model file to write"
)
def tokenizer(files: tuple[str, ...], vocab_size: int, out: str) -> None:
    """Train a sentencepiece model that reproduces any text exactly."""
    from btx_jax.data.sentencepiece_models import train_sentencepiece
    from btx_jax.data.sources import Problems, expand_files, parse_sources, read_documents
    from btx_jax.output import none_left_empty

    problems = Problems()
    found = [
        (file, source.field)
        for notation in files
        for source in parse_sources(notation, "FILES")
        for file in expand_files(source, "FILES")
    ]
    texts = (text for file, field in found for text in read_documents(file, field, problems))
    target = to_path(out, "--out")
    with none_left_empty(target.parent):
        train_sentencepiece(texts, vocab_size, target)
    for line in problems.lines():
        logging.warning(line)
    terminal.say(f"wrote {out}")
