"""Corpora for experiments at a million parameters, large enough to train on 20M tokens without
repetition:

    python -m btx_jax.data.corpora [DIRECTORY]       # by default runs/corpora

writes DIRECTORY/{seed,branch,finetune}/{math,code,world,prose}.jsonl.gz, in which every document
occurs once, and DIRECTORY/tokenizer.model. Each part is for one phase of training; the parts share
no document.

math, code and world contain the whole demo corpora; code also has the sources of libraries that
btx_jax needs, prose the docstrings of others. If BTX_DATA_DIR is set, text from its directory text/
is added: short problems and grade-school word problems to math, chapters of books to prose. Without
it, prose is a third as long, and a seed of 20M tokens reads it three times.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from btx_jax import environment
from btx_jax.data import demo
from btx_jax.data.sentencepiece_models import train_sentencepiece
from btx_jax.errors import UserError
from btx_jax.output import new_directory
from btx_jax.progress import bar
from btx_jax.terminal import counted

DIRECTORY = "runs/corpora"
MATHS_BYTES = 18_000_000  # taken from an endless generator; halved where BTX_DATA_DIR adds text
LONGEST = 60_000  # bytes of a code module; longer ones are mostly tables
TOKENIZER, VOCAB_SIZE = "tokenizer.model", 2048
TOKENIZER_BYTES = 2_000_000  # bytes of each domain to train the tokenizer on
# Libraries whose modules go into code, and libraries whose docstrings go into prose in addition to
# numpy's, which the demo has; none is in both.
CODE = ("jax", "flax", "optax", "orbax", "sympy", "tensorflow_datasets", "grain")
DOCSTRINGS = ("scipy", "sklearn")
# Additional text of a domain, if it exists: files under BTX_DATA_DIR/text.
MORE = {
    "math": ("math_gsm8k_train", "math_generated"),
    "prose": ("prose_standardebooks",),
}
# Shares of each domain's documents. A seed reads mostly what no expert specialises in; world is the
# shortest, and a branch needs most of it.
PARTS = ("seed", "branch", "finetune")
SHARES = {
    "math": (0.64, 0.24, 0.12),
    "code": (0.66, 0.19, 0.15),
    "world": (0.17, 0.60, 0.23),
    "prose": (0.85, 0.05, 0.10),
}


def texts(domain: str) -> Iterator[str]:
    """Every document of a domain; some may occur twice."""
    folder = os.environ.get("BTX_DATA_DIR")
    if domain == "math":
        size = 0
        for text in demo.maths():
            yield text
            size += len(text.encode())
            if size >= MATHS_BYTES // (2 if folder else 1):
                break
    else:
        yield from demo.CORPORA[domain]()
    if domain == "code":
        yield from itertools.chain.from_iterable(map(_modules, CODE))
    if domain == "prose":
        yield from itertools.chain.from_iterable(map(demo.docstrings, DOCSTRINGS))
    if folder:
        for name in MORE.get(domain, ()):
            path = Path(folder) / "text" / f"{name}.jsonl.gz"
            if not path.exists():
                raise UserError(
                    f"BTX_DATA_DIR: {path} does not exist; unset BTX_DATA_DIR to do without it"
                )
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from (json.loads(line)["text"] for line in file)


def _modules(package: str) -> Iterator[str]:
    """Source files of an installed package, without tests; none if it is not installed."""
    for file in demo.sources(package):
        if 500 < file.stat().st_size < LONGEST:
            yield file.read_text(encoding="utf-8")


def write(directory: Path) -> None:
    """Write all parts of all domains and the tokenizer, or nothing. Raises UserError where
    something exists already."""
    environment.require("demo", "corpora")
    with new_directory(directory) as partial:
        for part in PARTS:
            (partial / part).mkdir()
        for domain in SHARES:
            for part, (documents, size) in zip(PARTS, _write(domain, partial), strict=True):
                told = counted(documents, "document")
                print(f"{part}/{domain}.jsonl.gz: {told}, {size / 1e6:.1f} MB")
        train_sentencepiece(_sample(partial), VOCAB_SIZE, partial / TOKENIZER)


def _write(domain: str, directory: Path) -> list[tuple[int, int]]:
    """Write the parts of a domain. Returns (documents, bytes) of each."""
    counts = [(0, 0)] * len(PARTS)
    seen: set[bytes] = set()
    with contextlib.ExitStack() as opened:
        files = [
            opened.enter_context(gzip.open(directory / part / f"{domain}.jsonl.gz", "wb", 6))
            for part in PARTS
        ]
        for text in bar(texts(domain), desc=f"making {domain}", unit=" documents", leave=False):
            encoded = text.encode()
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            part = part_of(digest, SHARES[domain])
            files[part].write(json.dumps({"text": text}).encode() + b"\n")
            documents, size = counts[part]
            counts[part] = documents + 1, size + len(encoded)
    return counts


def part_of(digest: bytes, shares: Iterable[float]) -> int:
    """The part that a document belongs to, by a hash of its text; independent of the hash that
    determines which documents are held out."""
    place = int.from_bytes(digest[:8]) / 2**64
    ends = list(itertools.accumulate(shares))
    return sum(place >= end for end in ends[:-1])


def _sample(directory: Path) -> Iterator[str]:
    """Text to train the tokenizer on: the same amount of each domain, from the seed's part."""
    for domain in SHARES:
        size = 0
        with gzip.open(directory / PARTS[0] / f"{domain}.jsonl.gz", "rt") as file:
            for line in file:
                text = json.loads(line)["text"]
                size += len(text)
                if size > TOKENIZER_BYTES:
                    break
                yield text


if __name__ == "__main__":
    try:
        write(Path(*(sys.argv[1:] or [DIRECTORY])))
    except UserError as error:
        sys.exit(f"corpora: error: {error}")
