"""`btx new`: write the config file of a new project."""

from collections.abc import Sequence

import rich_click as click

from btx_jax import terminal
from btx_jax.cli.parts import CHECKPOINT, TRAIN, WHERE, Number, command, text
from btx_jax.errors import Mistakes
from btx_jax.paths import to_path

COUNT = click.IntRange(min=1)


@command(
    panel=TRAIN,
    no_args_is_help=True,
    examples="""
btx new my_btx.py --seed=HuggingFaceTB/SmolLM2-135M \\
    --domain math='proofs/*.txt' --domain code='src/**/*.py' --general='web/*.jsonl.gz'
btx new my_btx.py --seed=tiny --tokenizer=my.model --domain bible=bible.txt --domain words=dict.txt
btx new my_btx.py --seed=models/base --domain law='law/*.jsonl#body' --branch law=org/law-finetune
""",
)
@click.argument("file", type=WHERE, help="the config file to write, such as my_btx.py")
@text(
    "--seed",
    type=WHERE,
    metavar="CHECKPOINT|SIZE",
    help=f"checkpoint from which all branches start: {CHECKPOINT}; or a size, to train a seed"
    " from scratch",
)
@click.option(
    "--domain",
    "domains",
    metavar="NAME=FILES",
    multiple=True,
    help=(
        "a domain and its text: files or globs, comma-separated, each optionally with #FIELD"
        " and :WEIGHT; may be repeated"
    ),
)
@text(
    "--general",
    metavar="FILES",
    help="text like the seed's training text: the seed becomes an expert too, so that less is"
    " forgotten",
)
@click.option(
    "--branch",
    "branches",
    metavar="NAME=CHECKPOINT",
    multiple=True,
    help="an existing finetune of the seed, used as this domain's expert; may be repeated",
)
@text("--tokenizer", type=WHERE, metavar="FILE", help="tokenizer of a seed trained from scratch")
@click.option(
    "--method",
    type=click.Choice(["ffn_only", "btx", "flexolmo"]),
    help=(
        "what branches train: only their feed-forwards, everything, or feed-forwards with an"
        " anchor; by default ffn_only, but btx if a --branch is given or the seed has had"
        " little training"
    ),
)
@click.option(
    "--compare",
    type=click.Choice(["dense", "upcycling"]),
    multiple=True,
    help="also train this baseline on equally many tokens; may be repeated",
)
@click.option(
    "--epochs",
    type=Number(min=0, min_open=True),
    metavar="N",
    default=1.0,
    help="training epochs of each branch",
)
@click.option(
    "--tokens", type=COUNT, metavar="N", help="training tokens of each branch, instead of epochs"
)
@click.option(
    "--finetune-tokens",
    type=COUNT,
    metavar="N",
    help="finetuning tokens of the mixture; by default as many as the shortest branch has",
)
@click.option(
    "--seed-tokens",
    type=COUNT,
    metavar="N",
    help="training tokens of a seed from scratch; by default all text",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="tokens per row; by default 512 to 4096, depending on the amount of text",
)
def new(
    file: str,
    seed: str,
    domains: tuple[str, ...],
    general: str,
    branches: tuple[str, ...],
    tokenizer: str,
    method: str | None,
    compare: tuple[str, ...],
    epochs: float,
    tokens: int | None,
    finetune_tokens: int | None,
    seed_tokens: int | None,
    sequence_length: int | None,
) -> None:
    """Write a config file for your own seed and domains: train, mix, finetune, evaluate, export.

    Reads and tokenises the text once, and chooses settings that suit it. `btx plan FILE` then
    estimates what the run takes, and `btx run FILE` runs it.
    """
    from btx_jax.commands.new import Wanted, run

    mistakes = Mistakes()
    found: dict[str, str] = {}
    experts: dict[str, str] = {}
    with mistakes.gather():
        found = _pairs(domains, "--domain", "NAME=FILES")
    with mistakes.gather():
        experts = _pairs(branches, "--branch", "NAME=CHECKPOINT")
    if not domains:
        mistakes.add("--domain: missing; give one per domain, --domain NAME=FILES")
    mistakes.tell()
    wanted = Wanted(
        seed,
        found,
        experts,
        general,
        tokenizer,
        method or "",
        compare,
        tokens or 0,
        finetune_tokens or 0,
        seed_tokens or 0,
        sequence_length or 0,
        epochs,
    )
    terminal.say(run(to_path(file, "FILE"), wanted))


def _pairs(words: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Parse NAME=VALUE words into a dict. Raises ConfigError that lists every mistake."""
    mistakes, pairs = Mistakes(), dict[str, str]()
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            mistakes.add(f"{option}={word}: must be {form}")
        elif name in pairs:
            mistakes.add(f"{option}={word}: {name} is given twice; leave one out")
        pairs[name] = value
    mistakes.tell()
    return pairs
