"""Tokenise a run of consecutive rows of a source: the unit of work of a worker, and the file that
holds the result."""

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btx_jax.config.config import DataConfig, FormatConfig
from btx_jax.data.documents import (
    Columns,
    Document,
    columns,
    formatted_document,
    is_heldout,
    order,
    text_document,
)
from btx_jax.data.files import Row
from btx_jax.data.instructions import Formatter, Piece
from btx_jax.data.sources import Problems, Source, documents
from btx_jax.data.tokenizers import Tokenizer
from btx_jax.errors import UserError, suggest
from btx_jax.output import new_file

SPLITS = ("train", "heldout")


class Told(NamedTuple):
    """Problems of one kind in a run of rows. split: the split with which they are reported; train
    for rows without a document. times: number of occurrences. Of the first occurrence, documents is
    the number of the split's documents before it, item the number of its row in the run, and place
    its location for messages."""

    split: str
    kind: str
    times: int
    documents: int
    item: int
    place: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts for a run of rows. splits: counts by split. orders: smallest and largest `order` of
    its documents; empty without documents. characters: total length of its texts."""

    splits: dict[str, dict[str, int]]
    told: tuple[Told, ...]
    orders: tuple[int, ...]
    characters: int


class Tokenised(NamedTuple):
    counts: Counts
    columns: dict[str, Columns]


def no_counts() -> dict[str, int]:
    return {"documents": 0, "tokens": 0, "bytes": 0, "rows": 0, "largest_id": -1}


class Tokeniser:
    """Tokenises rows of a source. Raises UserError for an unknown format."""

    def __init__(self, source: Source, tokenizer: Tokenizer, config: DataConfig):
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._template = find_format(source, tokenizer, config)
        self._frame = len(tokenizer.prefix) + (tokenizer.eos is not None)

    def __call__(self, rows: Sequence[Row]) -> Tokenised:
        counts = {split: no_counts() for split in SPLITS}
        held: dict[str, list[Document]] = {split: [] for split in SPLITS}
        told: dict[tuple[str, str], Told] = {}
        orders: tuple[int, ...] = ()
        characters = 0

        def tell(split: str, kind: str, item: int, place: str, count: int = 1) -> None:
            first = Told(split, kind, 0, len(held[split]), item, place)
            first = told.get((split, kind), first)
            told[split, kind] = first._replace(times=first.times + count)

        for item, row in enumerate(rows):
            seen = Problems()
            for place, pieces in self._pieces(row, seen):
                text = "".join(piece.text for piece in pieces)
                orders = tuple(f((*orders, order(text))) for f in (min, max))
                split = SPLITS[is_heldout(text, self._config.heldout_fraction)]
                document = self._document(pieces, text)
                if document is None:
                    assert self._template is not None
                    kind = (
                        f"item skipped: its prompt fills the cutoff of {self._template.cutoff}"
                        " tokens"
                    )
                    tell(split, kind, item, place)
                    continue
                ids, size, *_ = document
                counts[split]["largest_id"] = max(counts[split]["largest_id"], max(ids, default=-1))
                if len(ids) + self._frame > self._config.sequence_length + 1:
                    kind = (
                        f"document longer than {self._config.sequence_length} tokens: split"
                        " into several rows, nothing is lost"
                    )
                    tell(split, kind, item, place)
                for key, value in (("documents", 1), ("tokens", len(ids)), ("bytes", size)):
                    counts[split][key] += value
                characters += len(text)
                held[split].append(document)
            for kind, count in seen.counts.items():
                tell("train", kind, item, seen.first[kind], count)
        return Tokenised(
            Counts(counts, tuple(told.values()), orders, characters),
            {split: columns(held[split], self._tokenizer) for split in SPLITS},
        )

    def _pieces(self, row: Row, problems: Problems) -> Iterator[tuple[str, list[Piece]]]:
        if self._template:
            yield from self._template.items([row], problems)
            return
        for place, text in documents([row], self._source.field, problems):
            yield place, [Piece(text, True)]

    def _document(self, pieces: list[Piece], text: str) -> Document | None:
        if self._template is None:
            return text_document(text, self._tokenizer)
        cutoff = self._template.cutoff - self._frame
        return formatted_document(pieces, self._tokenizer, cutoff, self._template.is_chat)


def find_format(source: Source, tokenizer: Tokenizer, config: DataConfig) -> Formatter | None:
    """The formatter of `FILE#@NAME`; None for a source that names no format. Raises UserError for
    an unknown name."""
    if not source.field.startswith("@"):
        return None
    return Formatter(require_format(source, config), tokenizer, config.sequence_length)


def require_format(source: Source, config: DataConfig) -> FormatConfig:
    """The format of `FILE#@NAME`. Raises UserError for an unknown name."""
    name = source.field[1:]
    if name not in config.formats:
        raise UserError(
            f"config.data.formats: no format {name!r} for {source.where};"
            f" {suggest(name, config.formats)}"
        )
    return config.formats[name]


def save(tokenised: Tokenised, file: Path) -> None:
    """Write to a file in numpy's format, completely or not at all. Each array is stored in the
    smallest integer type that holds it."""
    arrays = {
        f"{split}/{name}": _narrow(array)
        for split, of_split in tokenised.columns.items()
        for name, array in of_split._asdict().items()
    }
    counts = json.dumps(dataclasses.asdict(tokenised.counts)).encode()
    with new_file(file) as partial, partial.open("wb") as opened:
        np.savez(opened, allow_pickle=False, counts=np.frombuffer(counts, np.uint8), **arrays)


def _narrow(array: np.ndarray) -> np.ndarray:
    if not array.size:
        return array
    return array.astype(np.result_type(*map(np.min_scalar_type, (array.min(), array.max()))))


def load_counts(file: Path) -> Counts | None:
    """The counts in a file; None if it is missing or incomplete."""
    try:
        values: dict[str, Any] = json.loads(bytes(_load(file, "counts")))
        told = tuple(Told(*each) for each in values["told"])
        return Counts(values["splits"], told, tuple(values["orders"]), values["characters"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def load_columns(file: Path, split: str) -> Columns:
    """The columns of a split. Raises UserError when the file is damaged or missing."""
    try:
        return Columns(*(_load(file, f"{split}/{name}") for name in Columns._fields))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file}: missing or damaged ({error}); delete {file.parent} and run the same"
            " command again"
        ) from error


def _load(file: Path, name: str) -> np.ndarray:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return arrays[name]
