"""Tokenise and pack once, so that training never tokenises: text -> an ArrayRecord TFDS data set
with a manifest.

A prepared set holds rows of sequence_length + 1 tokens, in the splits `train` and `heldout`, which
share no document. Consecutive rows overlap by one token, so that every token but a document's first
is the target of exactly one row.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from btx_jax.config.config import DataConfig, FormatConfig
from btx_jax.data import demo
from btx_jax.data.files import COMPRESSIONS
from btx_jax.data.instructions import Formatter, Piece, encode_pieces
from btx_jax.data.sources import (
    Domain,
    Problems,
    Source,
    documents,
    expand_files,
    parse_domains,
    source_rows,
)
from btx_jax.data.tokenizers import Tokenizer, load_tokenizer
from btx_jax.errors import Mistakes, UserError, suggest
from btx_jax.output import new_directory, sweep
from btx_jax.paths import expand
from btx_jax.terminal import plain

FORMAT = 3  # changes whenever the rows that the same text gives change
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
DEMO = "demo:"  # as a tokenizer: the one that is made for the demo corpora

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """A tokenised source on disk. manifest: tokenizer and source hashes, counts by split, problems,
    `heldout_from`: the shares of the source that would hold out its first and its last document."""

    directory: Path
    weight: float
    manifest: dict[str, Any]

    def rows(self, split: str) -> int:
        return self.manifest["splits"][split]["rows"]

    def open(self, split: str) -> Any:
        """Random access to {tokens, segments: [sequence + 1] int32, bytes: []}, for grain. A row
        that is damaged raises UserError when it is read."""
        builder = tfds.builder_from_directory(str(self.directory))
        return _Rows(builder.as_data_source(split=split), self.directory.parent)


class _Rows:
    """A split of a prepared set."""

    def __init__(self, rows: Any, directory: Path):
        self._rows, self._directory = rows, directory

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self):
            raise IndexError(index)
        try:
            return self._rows[index]
        except (RuntimeError, OSError) as error:  # ArrayRecord checks a hash of whatever it reads
            raise UserError(
                f"{self._directory}: row {index} cannot be read ({str(error).splitlines()[0]});"
                " delete that directory and run the same command again: its text is prepared anew"
            ) from error


@dataclasses.dataclass(frozen=True)
class PreparedDomain:
    name: str
    weight: float
    sources: tuple[PreparedSource, ...]

    def largest_id(self) -> int:
        """Of all tokens of its rows; -1 when there are none."""
        splits = (s for source in self.sources for s in source.manifest["splits"].values())
        return max(split["largest_id"] for split in splits)

    def identity(self) -> str:
        """A hash of what the domain's rows are made of, wherever its files lie."""
        made = [(source.manifest, source.weight) for source in self.sources]
        told = [
            [[file["sha256"] for file in m["files"]], m["field"], m["splits"], weight]
            for m, weight in made
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def is_heldout(text: str, fraction: float) -> bool:
    """By a hash of the text: the same document is held out in every run, wherever it comes from and
    however often."""
    return _order(text) < fraction * 2**64


def _order(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def none_heldout(domain: PreparedDomain) -> str:
    """Why a domain without held-out rows has none, and what helps."""
    manifests = [source.manifest for source in domain.sources]
    told = f"domain {domain.name!r} has no held-out document"
    fraction = manifests[0]["heldout_fraction"]
    if any(m["splits"]["heldout"]["documents"] for m in manifests):
        return f"{told} with a token to predict: those that it has are empty or of one token"
    count = sum(m["splits"]["train"]["documents"] for m in manifests)
    first = min(m["heldout_from"][0] for m in manifests)
    if first == max(m["heldout_from"][1] for m in manifests):
        return f"{told}: {ONE_DOCUMENT}"
    return (
        f"{told}: config.data.heldout_fraction={fraction:g} holds out none of its {count}; from"
        f" {_above(first):g} on, in every run that reads this text, it holds one out"
    )


ONE_DOCUMENT = (
    "its text is one document, which is held out whole or not at all; give it as several, for"
    " example one on each line of a .jsonl file"
)


def _above(share: float) -> float:
    """A number a little larger, of few digits, below 1."""
    digits = 1 - math.floor(math.log10(max(share, 1e-9)))
    above = (math.floor(share * 10**digits) + 1) / 10**digits
    return above if above < 1 else (share + 1) / 2


class Document(NamedTuple):
    """ids: of its tokens. bytes: in UTF-8, of the text that is learnt, but for ends of text written
    out in it, whose losses are no part of bits per byte. learnt: of each token, whether it is a
    target; None for all. is_chat: rendered by a chat template, which writes its own beginning."""

    ids: list[int]
    bytes: int
    learnt: list[bool] | None = None
    is_chat: bool = False


def pack(
    documents: Iterator[Document], tokenizer: Tokenizer, sequence_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Documents -> rows {tokens, segments, bytes}.

    In front of each document stands what the tokenizer itself puts there (`Tokenizer.prefix`) and
    behind it EOS, where there is one, unless its text ends in EOS itself; in front of a chat stands
    nothing. Each gets the next segment number of its row, from 1; the last row is padded with
    segment 0. A token that is read but not learnt, as a prompt's, has its segment's number negated.
    bytes: of the text whose tokens are targets in the row (a document's bytes are spread evenly
    over its tokens, but for EOS), so that the bytes of all rows add up to those of the text.
    """
    width = sequence_length + 1
    # token, document number, bytes, 1 if learnt else -1
    columns = [np.zeros(0, np.int64) for _ in range(4)]
    after = [tokenizer.eos] if tokenizer.eos is not None else []

    def row(columns: list[np.ndarray]) -> dict[str, np.ndarray]:
        tokens, document, size, sign = columns
        continues = np.concatenate([[False], document[1:] == document[:-1]])
        padding = (0, width - len(tokens))
        return {
            "tokens": np.pad(tokens, padding).astype(np.int32),
            "segments": np.pad((document - document[0] + 1) * sign, padding).astype(np.int32),
            "bytes": np.array(size[continues & (sign > 0)].sum(), np.int32),
        }

    for number, (ids, text_bytes, learnt, is_chat) in enumerate(documents):
        before = [] if is_chat else tokenizer.prefix
        is_learnt = np.ones(len(ids), bool) if learnt is None else np.array(learnt, bool)
        counted = is_learnt & (np.array(ids) != (-1 if tokenizer.eos is None else tokenizer.eos))
        count = int(counted.sum())
        spread = np.zeros(len(ids), np.int64)
        spread[counted] = np.diff(np.arange(count + 1) * text_bytes // max(count, 1))
        end = [] if _ends_itself(ids, tokenizer, is_chat) else after
        sizes = np.concatenate(
            [np.zeros(len(before), np.int64), spread, np.zeros(len(end), np.int64)]
        )
        tokens = np.array(before + ids + end, np.int64)
        signs = np.ones(len(tokens), np.int64)
        signs[len(before) : len(before) + len(ids)] = np.where(is_learnt, 1, -1)
        more = (tokens, np.full(len(tokens), number), sizes, signs)
        columns = [np.concatenate(pair) for pair in zip(columns, more, strict=True)]
        start = 0
        while len(columns[0]) - start >= width:
            yield row([c[start : start + width] for c in columns])
            start += sequence_length
        columns = [c[start:] for c in columns]
    if len(columns[0]) > 1:
        yield row(columns)


def _ends_itself(ids: list[int], tokenizer: Tokenizer, is_chat: bool) -> bool:
    """Whether EOS is already the last token but for blanks; of a chat, any special token, with
    which templates end a turn."""
    ends = tokenizer.special_ids if is_chat else {tokenizer.eos}
    last = ids[-1:] if ids[-1:] and ids[-1] in ends else ids[-2:-1]
    return bool(last) and last[0] in ends and not tokenizer.decode(ids[-1:]).strip()


def _bytes(text: str, ids: Iterable[int], tokenizer: Tokenizer) -> int:
    """In UTF-8, without the ends of text that are written out in it."""
    ends = sum(i == tokenizer.eos for i in ids)
    return len(text.encode("utf-8")) - (ends and ends * len(tokenizer.eos_text.encode("utf-8")))


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """Raises NotUnicode for a lone surrogate, which JSON can carry and UTF-8 cannot."""
    ids = tokenizer.encode(text)
    return Document(ids, _bytes(text, ids, tokenizer))


def formatted_document(
    pieces: list[Piece], tokenizer: Tokenizer, cutoff: int, is_chat: bool = False
) -> Document | None:
    """Cut to `cutoff` tokens; None when no answer is left. Raises NotUnicode as text_document
    does."""
    ids, learnt = encode_pieces(pieces, tokenizer)
    answers = "".join(piece.text for piece in pieces if piece.learnt)
    size = _bytes(
        answers, (i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt), tokenizer
    )
    if len(ids) > cutoff:
        size = size * sum(learnt[:cutoff]) // max(sum(learnt), 1)
        ids, learnt = ids[:cutoff], learnt[:cutoff]
    return Document(ids, size, learnt, is_chat) if any(learnt) else None


class PackedText(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder behind `prepare_source`."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def __init__(
        self, rows: dict[str, Iterator[dict[str, np.ndarray]]], sequence_length: int, **kwargs: Any
    ):
        self._rows, self._width = rows, sequence_length + 1
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        row = tfds.features.Tensor(shape=(self._width,), dtype=np.int32)
        features = tfds.features.FeaturesDict({"tokens": row, "segments": row, "bytes": np.int32})
        return tfds.core.DatasetInfo(
            builder=self, features=features, description="Tokenised, packed text."
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._rows}

    def _generate_examples(self, split):
        yield from enumerate(self._rows[split])


def prepare_source(source: Source, tokenizer: Tokenizer, config: DataConfig) -> PreparedSource:
    """Tokenise one source into the cache, or find it there; one that is damaged is made anew.
    Raises UserError when it holds no document.

    The cache key covers text (path, size and modification time of each file), format, tokenizer,
    sequence length and held-out share.
    """
    cache = cache_of(config)
    template = find_format(source, tokenizer, config)
    if source.where.startswith("demo:"):
        source = dataclasses.replace(
            source, where=str(demo.corpus(source.where.removeprefix("demo:"), cache))
        )
    files = [] if source.where.startswith("tfds:") else expand_files(source)
    identity = {
        "format": FORMAT,
        "source": _stamps(files) if files else source.where,
        "field": source.field,
        "tokenizer_sha256": tokenizer.sha256,
        "sequence_length": config.sequence_length,
        "heldout_fraction": config.heldout_fraction,
    } | ({"how": template.identity()} if template else {})
    target = cache / "packed" / _sha256_of(identity)[:16]
    manifest = _read_manifest(target)
    if manifest is None:
        try:
            _write(source, files, tokenizer, config, target, template)
        except UserError:
            if not target.exists():  # otherwise another process has just prepared the same text
                raise
        manifest = _read_manifest(target)
        if manifest is None:
            raise UserError(f"{target}: was damaged as soon as it was written; check the disk")
    return PreparedSource(target / "rows", source.weight, manifest)


def _stamps(files: list[Path]) -> list[Any]:
    """What changes when a file does."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _read_manifest(target: Path) -> dict[str, Any] | None:
    """That of a prepared set; None when there is none, also because it was damaged: then a line
    says so and the set is gone.

    Small files are compared with their checksums, ArrayRecord files in size: those are checked
    wherever they are read.
    """
    if not target.exists():
        return None
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256", None) != _sha256_of(manifest):
            raise ValueError(f"{MANIFEST} is not as it was written")
        for name, written in manifest["rows"].items():
            file = target / "rows" / name
            if file.stat().st_size != written["bytes"] or (
                file.suffix == ".json" and _sha256(file) != written["sha256"]
            ):
                raise ValueError(f"rows/{name} is not as it was written")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); its text is prepared anew", target, error)
        shutil.rmtree(target)
        return None
    return manifest


def find_format(source: Source, tokenizer: Tokenizer, config: DataConfig) -> Formatter | None:
    """That of `FILE#@NAME`. Raises UserError for an unknown name."""
    if not source.field.startswith("@"):
        return None
    return Formatter(require_format(source, config), tokenizer, config.sequence_length)


def require_format(source: Source, config: DataConfig) -> FormatConfig:
    """That of `FILE#@NAME`. Raises UserError for an unknown name."""
    name = source.field[1:]
    if name not in config.formats:
        raise UserError(
            f"config.data.formats: no format {name!r} for {source.where};"
            f" {suggest(name, config.formats)}"
        )
    return config.formats[name]


def _write(
    source: Source,
    files: list[Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    target: Path,
    template: Formatter | None,
) -> None:
    empty = {"documents": 0, "tokens": 0, "bytes": 0, "rows": 0, "largest_id": -1}
    counts = {split: dict(empty) for split in SPLITS}
    problems, failed = Problems(), list[UserError]()
    orders: list[int] = []  # the least and the largest of all documents
    stamps = _stamps(files)
    total = sum(f.stat().st_size for f in files) or None
    frame = len(tokenizer.prefix) + (tokenizer.eos is not None)

    def encoded(split: str, progress: tqdm) -> Iterator[Document]:
        # The source is read once per split; its problems are the same both times and count once.
        seen = problems if split == "train" else Problems()
        read = source_rows(source, files)
        items = (
            template.items(read, seen)
            if template
            else ((p, [Piece(text, True)]) for p, text in documents(read, source.field, seen))
        )
        for place, pieces in items:
            text = "".join(piece.text for piece in pieces)
            orders[:] = [f(orders + [_order(text)]) for f in (min, max)]
            if is_heldout(text, config.heldout_fraction) != (split == "heldout"):
                continue
            document = (
                formatted_document(pieces, tokenizer, template.cutoff - frame, template.is_chat)
                if template
                else text_document(text, tokenizer)
            )
            if document is None:
                assert template is not None
                problems.add(
                    f"item skipped: its prompt fills the cutoff of {template.cutoff} tokens", place
                )
                continue
            ids, size, *_ = document
            counts[split]["largest_id"] = max([counts[split]["largest_id"], *ids])
            if len(ids) + frame > config.sequence_length + 1:
                problems.add(
                    f"document longer than {config.sequence_length} tokens: cut into several rows,"
                    " none lost",
                    place,
                )
            for key, value in (("documents", 1), ("tokens", len(ids)), ("bytes", size)):
                counts[split][key] += value
            progress.update(len(text))
            yield document

    def rows(split: str) -> Iterator[dict[str, np.ndarray]]:
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=f"tokenise {split}: {plain(Path(source.where).name)}",
            leave=False,
        ) as progress:
            progress.total = (
                None if any(f.suffix in (*COMPRESSIONS, ".parquet") for f in files) else total
            )
            try:
                for row in pack(encoded(split, progress), tokenizer, config.sequence_length):
                    counts[split]["rows"] += 1
                    yield row
            except UserError as error:
                failed.append(error)
                raise

    started: dict[str, Iterator[dict[str, np.ndarray]]] = {}  # TFDS refuses a split without rows
    for split in SPLITS:
        iterator = rows(split)
        if (first := next(iterator, None)) is not None:
            started[split] = itertools.chain([first], iterator)
    if "train" not in started:
        causes = problems.lines() or ["no document has a token to predict"]
        if "heldout" in started:
            causes = [_all_heldout(orders, config.heldout_fraction)]
        raise UserError(
            f"config.data: {source.where} gives no document to train on: {'; '.join(causes)}"
        )
    sweep(target.parent)
    with new_directory(target) as temporary:
        builder = PackedText(started, config.sequence_length, data_dir=str(temporary / "build"))
        try:
            _quietly(builder.download_and_prepare)
        except Exception as error:
            if failed:  # TFDS wraps what its generator raises in pages of its own
                raise failed[0] from None
            if cause := re.search(r"write\(\) failed: ([^;]*)", str(error)):  # in ArrayRecord
                raise UserError(f"cannot write {target}: {cause[1]}") from error
            raise
        manifest = {
            "format": FORMAT,
            "source": source.where,
            "field": source.field,
            "files": [
                {"path": str(f), "bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files
            ],
            "tokenizer_sha256": tokenizer.sha256,
            "sequence_length": config.sequence_length,
            "heldout_fraction": config.heldout_fraction,
            "heldout_from": [order / 2**64 for order in orders],
            "splits": counts,
            "problems": {
                kind: [count, problems.first[kind]] for kind, count in problems.counts.items()
            },
        }
        if _stamps(files) != stamps:
            raise UserError(
                f"{source.where}: changed while it was read; run the same command again"
            )
        rows_at = shutil.move(builder.data_path, temporary / "rows")
        shutil.rmtree(temporary / "build")
        manifest["rows"] = {
            f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)}
            for f in sorted(Path(rows_at).iterdir())
        }
        manifest["sha256"] = _sha256_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _quietly(prepare: Any) -> None:
    """TFDS without its own progress bars and advice: this module's bar and log speak for it."""
    tfds.disable_progress_bar()
    absl = logging.getLogger("absl")
    previous = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare()
    finally:
        absl.setLevel(previous)


def _all_heldout(orders: list[int], fraction: float) -> str:
    if orders[0] == orders[1]:
        return f"all is held out: {ONE_DOCUMENT}"
    below = math.floor(orders[1] / 2**64 * 1e4) / 1e4
    return (
        f"config.data.heldout_fraction={fraction:g} holds out every document; lower it to less than"
        f" {below:g}"
    )


def _sha256_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cache_of(config: DataConfig) -> Path:
    return Path(expand(config.cache, "config.data.cache"))


def resolve_tokenizer(config: DataConfig, checkpoint_tokenizer: Path | None) -> Tokenizer:
    """The config's tokenizer, else that of the checkpoint the run starts from. Raises UserError
    when there is neither."""
    if config.tokenizer == DEMO:
        found = load_tokenizer(demo.tokenizer(cache_of(config)))
    elif config.tokenizer:
        found = load_tokenizer(expand(config.tokenizer, "config.data.tokenizer"))
    elif checkpoint_tokenizer is None:
        raise UserError(
            "config.data.tokenizer: not set, and no init checkpoint to take it from; name a .model"
            " or tokenizer.json"
        )
    else:
        found = load_tokenizer(checkpoint_tokenizer)
    return found if config.bos == "auto" else found.with_bos(config.bos == "always")


def texts(config: DataConfig) -> list[tuple[str, str]]:
    """(key, text as it names it) of all that is trained on and of what is held out."""
    named = [("config.data.train", config.train), ("config.data.heldout", config.heldout)]
    return [(key, notation) for key, notation in named if notation or key == "config.data.train"]


def check_text(config: DataConfig, notations: Iterable[tuple[str, str]]) -> None:
    """notations: as `texts` gives them. Raises ConfigError with all that is known to be wrong
    before any of it is read: names, formats and files that are not there."""
    mistakes = Mistakes()
    for key, notation in notations:
        domains: tuple[Domain, ...] = ()
        with mistakes.gather():
            domains = parse_domains(notation, config.domains, key)
        for domain in domains:
            named = f"config.data.domains.{domain.name}" if domain.name in config.domains else key
            for source in domain.sources:
                with mistakes.gather():
                    if source.field.startswith("@"):
                        require_format(source, config)
                    if source.where.startswith("demo:"):
                        demo.require(source.where.removeprefix("demo:"))
                    elif not source.where.startswith("tfds:"):
                        expand_files(source, named)
    mistakes.tell()


def prepare(
    notation: str, config: DataConfig, tokenizer: Tokenizer, key: str
) -> tuple[PreparedDomain, ...]:
    """Every source of every domain of `notation`, tokenised. The slow step of a first run; later
    runs find all in the cache."""
    check_text(config, [(key, notation)])
    prepared = tuple(
        PreparedDomain(
            d.name, d.weight, tuple(prepare_source(s, tokenizer, config) for s in d.sources)
        )
        for d in parse_domains(notation, config.domains, key)
    )
    tell_problems([source for domain in prepared for source in domain.sources], key)
    return prepared


_told: set[Path] = set()  # sources whose problems this process has told: stages read them again


def tell_problems(sources: Sequence[PreparedSource], key: str) -> None:
    """What had to be left out or cut, by kind over all sources, each source's once a process."""
    new = {source.directory: source for source in sources if source.directory not in _told}
    _told.update(new)
    together = Problems()
    for source in new.values():
        for kind, (count, first) in source.manifest["problems"].items():
            together.add(kind, first, count)
    for line in together.lines():
        log.warning("%s: %s", key, line)
