"""Write the config file of a new project: a seed and domains, with settings that suit the amount of
text."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from btx_jax import terminal
from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config import DataConfig
from btx_jax.data.files import size_of
from btx_jax.data.prepare import already_prepared, prepare, shared_text
from btx_jax.data.prepared import PreparedDomain, heldout_share, none_heldout
from btx_jax.data.sources import expand_files, parse_sources
from btx_jax.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer, named_tokenizer
from btx_jax.errors import ConfigError, Mistakes, suggest
from btx_jax.models.llama import parameter_counts
from btx_jax.output import write_text
from btx_jax.presets.project import (
    COMPARISONS,
    GENERAL,
    METHODS,
    NO_NAME,
    TOO_FEW,
    is_name,
    schedule,
)
from btx_jax.presets.recipes import MODELS
from btx_jax.training.start import COMPUTE_OPTIMAL, is_pretrained

FEW_STEPS = 100  # too few for a branch to learn much
UNEVEN = 10  # ratio of two domains' amounts of text
MANY_EPOCHS = 4  # Muennighoff et al., 2023: up to here, repetition is as good as new text
MOST_HELDOUT = 0.3  # share of a domain's documents
# Minimum bytes of all text -> (row length, held-out share): the less text there is, the larger the
# share needed for evaluation.
SIZES = ((4e9, 4096, 0.001), (4e7, 1024, 0.01), (0, 512, 0.05))

FILE = '''"""{count} domains from the seed {seed}, mixed.

    btx plan {name}     what it takes, before anything is trained
    btx run {name}      all of it; the same command resumes it
    btx submit --pipeline={name} --backend=gke ...     its branches as jobs, side by side

docs/your-domains.md describes every field. What it makes can be changed on the command line, too:
btx run {name} --config.pipeline.finetune.config.train.learning_rate=1e-5
"""

from btx_jax.presets.project import project


def get_config():
    return project(
        seed={quoted},
{fields}
    )
'''


@dataclass(frozen=True)
class Wanted:
    """The user's choices for a new project. domains: name -> files, in data's notation. branches:
    name -> the domain's expert, where it exists already. method: "" to choose by the seed. tokens:
    training tokens per branch; 0 for `epochs` of its text. sequence_length: tokens per row; 0 to
    choose by the amount of text."""

    seed: str
    domains: Mapping[str, str]
    branches: Mapping[str, str]
    general: str
    tokenizer: str
    method: str
    compare: Sequence[str]
    tokens: int
    finetune_tokens: int
    seed_tokens: int
    sequence_length: int
    epochs: float

    @property
    def texts(self) -> dict[str, str]:
        """The text of all domains, the general one last."""
        return dict(self.domains) | ({GENERAL: self.general} if self.general else {})


def run(target: Path, wanted: Wanted) -> str:
    """Write the config file; returns a message. Raises ConfigError with all mistakes, and then
    writes nothing."""
    context, tokenizer = _start(target, wanted)
    texts = wanted.texts
    length, heldout = next(
        (length, share) for least, length, share in SIZES if _bytes(texts) >= least
    )
    length = min(wanted.sequence_length or length, context)
    prepared, data = _prepared(texts, tokenizer, length, heldout)
    counted = {domain.name: _tokens(domain) for domain in prepared}
    numbers = _numbers(wanted, counted)
    shared = shared_text(already_prepared(data.train, data, tokenizer, "--domain"))
    too_large = _scratch_warnings(wanted, numbers, tokenizer)
    for warning in (*too_large, *_warnings(wanted, counted, numbers, length), *shared):
        terminal.warn(warning)
    write_text(target, _file(target, wanted, counted, numbers, length, data.heldout_fraction))
    name = terminal.plain(str(target))
    return (
        f"wrote {name}: read it, change what you like, then\n"
        f"  btx plan {name}   # what it takes, before anything is trained\n"
        f"  btx run {name}    # all of it; the same command resumes it"
    )


def _start(target: Path, wanted: Wanted) -> tuple[int, Tokenizer]:
    """(the seed's context length, its tokenizer). Raises ConfigError."""
    mistakes = Mistakes()
    if target.exists():
        mistakes.add(f"FILE: {target} exists already; choose another name or delete it")
    elif not target.parent.is_dir():
        mistakes.add(f"FILE: {target.parent} is not a directory; create it first")
    elif not os.access(target.parent, os.W_OK):
        mistakes.add(f"FILE: cannot write to {target.parent}; choose another directory")
    if target.suffix != ".py":
        mistakes.add(
            f"FILE: {target} is a config, which must be a Python file; name it {target.stem}.py"
        )
    if len(wanted.texts) < 2:
        mistakes.add(f"--domain: {TOO_FEW}")
    for name in wanted.domains:
        if not is_name(name):
            mistakes.add(f"--domain {name}: {NO_NAME}")
    for name, branch in wanted.branches.items():
        with mistakes.gather():
            find_checkpoint(branch, f"--branch {name}")
        if name not in wanted.domains:
            mistakes.add(
                f"--branch={name}=...: no such domain; give its text with --domain {name}=FILES"
            )
    for name, text in wanted.texts.items():
        option = "--general" if name == GENERAL else f"--domain {name}"
        with mistakes.gather():
            for source in parse_sources(text, option):
                if not source.where.startswith(("demo:", "tfds:")):
                    expand_files(source, option)
    context, own = 0, None
    with mistakes.gather():
        if not wanted.seed:
            raise ConfigError(
                "--seed: missing; name a checkpoint (a directory, org/name of the Hub), or a size"
                f" to train from scratch: {', '.join(MODELS)}"
            )
        if wanted.seed in MODELS:
            context = MODELS[wanted.seed].context
            if not wanted.tokenizer:
                raise ConfigError(
                    f"--tokenizer: missing, but --seed={wanted.seed} is trained from scratch;"
                    " name a .model or tokenizer.json (`btx tokenizer FILES --out=my.model`"
                    " trains one)"
                )
        else:
            if "/" not in wanted.seed and not Path(wanted.seed).exists():
                raise ConfigError(
                    f"--seed={wanted.seed}: neither an existing directory nor a size to train"
                    f" from scratch; {suggest(wanted.seed, MODELS)}"
                )
            for option, value in (
                ("--tokenizer", wanted.tokenizer),
                ("--seed-tokens", wanted.seed_tokens),
            ):
                if value:
                    mistakes.add(f"{option}={value}: the seed is already trained; leave it out")
            seed = find_checkpoint(wanted.seed, "--seed")
            context, own = seed.metadata.model.context, find_tokenizer(seed.tokenizer)
        if wanted.sequence_length > context:
            raise ConfigError(
                f"--sequence-length={wanted.sequence_length}: longer than the seed's context; use"
                f" at most {context}"
            )
    mistakes.tell()
    return context, load_tokenizer(own) if own else named_tokenizer(wanted.tokenizer, "--tokenizer")


def _bytes(texts: Mapping[str, str]) -> int:
    """Total bytes of all files of known size."""
    sources = [source for text in texts.values() for source in parse_sources(text, "--domain")]
    files = [expand_files(s) for s in sources if not s.where.startswith(("demo:", "tfds:"))]
    return sum(size_of(file) for found in files for file in found)


def _prepared(
    texts: Mapping[str, str], tokenizer: Tokenizer, length: int, heldout: float
) -> tuple[tuple[PreparedDomain, ...], DataConfig]:
    """Tokenise all text into the cache that `btx run` uses. Returns the prepared domains, and the
    DataConfig that they were read with: its held-out share is the given one, or, if that leaves a
    domain without held-out documents, the smallest that gives every domain one. Raises ConfigError
    for a domain that cannot have one."""
    while True:
        data = DataConfig(
            ",".join(texts), domains=texts, sequence_length=length, heldout_fraction=heldout
        )
        prepared = prepare(data.train, data, tokenizer, "--domain")
        bare = [d for d in prepared if not sum(s.rows("heldout") for s in d.sources)]
        if not bare:
            return prepared, data
        needed = max(map(heldout_share, bare))
        if not heldout < needed <= MOST_HELDOUT:
            raise ConfigError(*(f"--domain: {none_heldout(domain)}" for domain in bare))
        heldout = needed


def _tokens(domain: PreparedDomain) -> int:
    """Number of training tokens of a domain."""
    return sum(source.manifest["splits"]["train"]["tokens"] for source in domain.sources)


@dataclass(frozen=True)
class _Numbers:
    """Training tokens of each branch, the finetune, and a seed from scratch."""

    branches: Mapping[str, int]
    finetune: int
    seed: int


def _numbers(wanted: Wanted, counted: Mapping[str, int]) -> _Numbers:
    trained = [name for name in wanted.domains if name not in wanted.branches]
    branches = {name: wanted.tokens or round(wanted.epochs * counted[name]) for name in trained}
    lengths = branches.values() or [counted[name] for name in wanted.domains]
    finetune = wanted.finetune_tokens or min(lengths)
    seed = wanted.seed_tokens or sum(counted.values())
    return _Numbers(branches, finetune, seed if wanted.seed in MODELS else 0)


def _method(wanted: Wanted, numbers: _Numbers) -> str:
    """The chosen method, or the default that docs/results.md advises: ffn_only, whose branches mix
    exactly, if the seed has had much training; btx otherwise, or with a `--branch`."""
    if wanted.method:
        return wanted.method
    if wanted.branches:
        return "btx"
    if wanted.seed in MODELS:
        needed = COMPUTE_OPTIMAL * parameter_counts(MODELS[wanted.seed])[1]
        return "ffn_only" if numbers.seed >= needed else "btx"
    metadata = find_checkpoint(wanted.seed, "--seed").metadata
    return "ffn_only" if is_pretrained(metadata) else "btx"


def _scratch_warnings(wanted: Wanted, numbers: _Numbers, tokenizer: Tokenizer) -> Iterator[str]:
    """Warn about a seed trained from scratch on fewer tokens than it has parameters."""
    if wanted.seed not in MODELS:
        return
    sizes = {
        name: parameter_counts(dataclasses.replace(model, vocab_size=tokenizer.vocab_size))[0]
        for name, model in MODELS.items()
    }
    own = sizes[wanted.seed]
    if numbers.seed >= own:
        return
    smaller = {name: size for name, size in sizes.items() if size < own / 2}
    # The size that comes closest to one token per parameter.
    better = min(smaller, key=lambda name: abs(smaller[name] - numbers.seed), default="")
    cure = f"use --seed={better} ({sizes[better]:,}) or" if better else "use"
    yield (
        f"--seed={wanted.seed}: {own:,} parameters learn little from {numbers.seed:,} tokens,"
        f" {numbers.seed / own:.2g} per parameter ({COMPUTE_OPTIMAL} are compute-optimal);"
        f" {cure} a checkpoint, or give more text"
    )


def _warnings(
    wanted: Wanted, counted: Mapping[str, int], numbers: _Numbers, length: int
) -> Iterator[str]:
    for name, tokens in numbers.branches.items():
        if (steps := schedule(tokens, length).steps) < FEW_STEPS:
            few = terminal.counted(steps, "step")
            yield (
                f"{name}: its branch learns little in {few} on {tokens:,} tokens;"
                f" {_more(wanted)}, or shorten rows (--sequence-length, now {length})"
            )
        if (epochs := tokens / counted[name]) > MANY_EPOCHS:
            yield (
                f"{name}: its branch reads its text {epochs:.1f} times; beyond {MANY_EPOCHS},"
                " further repetition helps less and less"
            )
    longest, shortest = (
        pick(numbers.branches.items(), key=lambda item: item[1], default=("", 1))
        for pick in (max, min)
    )
    if longest[1] >= UNEVEN * shortest[1]:
        yield (
            f"{longest[0]}: its branch is {longest[1] / shortest[1]:.0f} times as long as that"
            f" of {shortest[0]}, and the mix waits for it; set their tokens in the file, or"
            " --tokens"
        )


def _more(wanted: Wanted) -> str:
    if wanted.tokens:
        return "raise --tokens"
    return "give it more text, or more --epochs"


def _file(
    target: Path,
    wanted: Wanted,
    counted: Mapping[str, int],
    numbers: _Numbers,
    length: int,
    heldout: float,
) -> str:
    """The config file, as Python that a person could have written."""
    name, lines = target.name, []
    if numbers.seed:
        lines += [
            f"seed_tokens={numbers.seed:_},  # from scratch, on all text below",
            f"tokenizer={_quoted(wanted.tokenizer)},",
        ]
    lines.append("domains={")
    for domain, text in wanted.domains.items():
        lines.append(f"    {_quoted(domain)}: {{  # {counted[domain]:,} tokens to train on")
        lines.append(f'        "text": {_quoted(text)},')
        if branch := wanted.branches.get(domain):
            lines.append(f'        "branch": {_quoted(branch)},  # instead of training one')
        else:
            tokens = numbers.branches[domain]
            told = f"{tokens / counted[domain]:.3g} x its text"
            lines.append(f'        "tokens": {tokens:_},  # {told}')
        lines.append("    },")
    lines.append("},")
    if wanted.general:
        lines.append("# Like the seed's own text: the seed is an expert of the mixture too.")
        lines.append(f"general={_quoted(wanted.general)},")
    compare = "".join(f"{_quoted(word)}, " for word in wanted.compare).rstrip()
    lines += [
        f"finetune_tokens={numbers.finetune:_},  # of the mixture, on all domains alike",
        f"method={_quoted(_method(wanted, numbers))},  # {', '.join(METHODS)}",
        f"compare=({compare}),  # also trained, on as many tokens: {', '.join(COMPARISONS)}",
        'tasks=(),  # test sets beside held-out loss, such as "arc_easy"',
        "prompts=(),  # continued by every model, side by side in the report",
        f"sequence_length={length},",
        f"heldout_fraction={heldout:g},  # of all documents: measured on, never trained on",
        f'dtype={_quoted(_dtype())},  # "bfloat16" on TPUs and GPUs',
    ]
    indented = "\n".join(f"        {line}" for line in lines)
    return FILE.format(
        count=len(wanted.domains), seed=wanted.seed, name=name, quoted=_quoted(wanted.seed),
        fields=indented,
    )  # fmt: skip


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _dtype() -> str:
    """The dtype of matmuls that is fastest on this machine."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
