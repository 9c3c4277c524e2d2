"""Tokenise and pack text once, so that training never tokenises: text -> an ArrayRecord TFDS data
set with a manifest.

A prepared set holds rows of sequence_length + 1 tokens in the splits `train` and `heldout`, which
share no document. Consecutive rows overlap by one token, so that every token but a document's first
is the target in exactly one row.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from btx_jax.config.config import DataConfig
from btx_jax.data import demo, documents
from btx_jax.data.documents import Columns
from btx_jax.data.files import COMPRESSIONS, File, size_of
from btx_jax.data.hub_files import HubFile
from btx_jax.data.prepared import (
    PreparedDomain,
    PreparedSource,
    all_heldout,
    read_manifest,
    sha256_of,
    sha256_of_file,
    write_set,
)
from btx_jax.data.sources import (
    Domain,
    Problems,
    Source,
    expand_files,
    parse_domains,
    source_rows,
)
from btx_jax.data.tokenise import FOLDER, Shards, WorkerEnded, discard, sweep_stale
from btx_jax.data.tokenised import (
    SPLITS,
    Counts,
    Told,
    find_format,
    no_counts,
    require_format,
)
from btx_jax.data.tokenizers import Tokenizer, load_tokenizer, named_tokenizer
from btx_jax.errors import Mistakes, UserError
from btx_jax.output import is_there
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.paths import to_path
from btx_jax.progress import bar
from btx_jax.terminal import plain

FORMAT = 3  # incremented when a change of the code makes different rows from the same text
DEMO = "demo:"  # as a tokenizer: the one trained on the demo corpora

log = logging.getLogger(__name__)


class _Task(NamedTuple):
    """A source to prepare.

    files: its files, unless it is a tensorflow_datasets set. stamps: `_stamp` of each file when the
    task was created. target: location of the prepared set in the cache, named by a hash of the text
    (its stamps), format, tokenizer, sequence length and held-out share.
    """

    source: Source
    files: list[File]
    stamps: list[list[Any]]
    tokenizer: Tokenizer
    config: DataConfig
    target: Path

    @property
    def folder(self) -> Path:
        """Directory of the finished shards."""
        return cache_of(self.config) / FOLDER / self.target.name

    def shards(self, host: tuple[int, int]) -> Shards:
        read = functools.partial(source_rows, self.source, [_at_hand(f) for f in self.files])
        return Shards(self.source, self.tokenizer, self.config, read, self.folder, host)


def _task(source: Source, tokenizer: Tokenizer, config: DataConfig) -> _Task:
    """Describe the preparation of a source. Raises UserError for an unknown format, and when there
    are no files."""
    cache = cache_of(config)
    template = find_format(source, tokenizer, config)
    if source.where.startswith("demo:"):
        source = dataclasses.replace(
            source, where=str(demo.corpus(source.where.removeprefix("demo:"), cache))
        )
    files: list[File] = [] if source.where.startswith("tfds:") else expand_files(source)
    stamps = [*map(_stamp, files)]
    identity = {
        "format": FORMAT,
        "source": stamps or source.where,
        "field": source.field,
        "tokenizer_sha256": tokenizer.sha256,
        "sequence_length": config.sequence_length,
        "heldout_fraction": config.heldout_fraction,
    } | ({"how": template.identity()} if template else {})
    target = cache / "packed" / sha256_of(identity)[:16]
    return _Task(source, files, stamps, tokenizer, config, target)


def prepare_source(
    source: Source, tokenizer: Tokenizer, config: DataConfig, hosts: int = 1
) -> PreparedSource:
    """Tokenise one source into the cache, or find it there; a damaged set is rebuilt. hosts: number
    of hosts that share the work (`tokenise_share`). Raises UserError when it contains no
    document."""
    task = _task(source, tokenizer, config)
    target = task.target
    manifest = read_manifest(target)
    if manifest is None:
        try:
            _write(task, hosts if _is_shared(source) else 1)
        except UserError:
            if not is_there(target):  # otherwise another process has prepared the same text
                raise
        manifest = read_manifest(target)
        if manifest is None:
            raise UserError(f"{target}: was damaged right after it was written; check the disk")
    together = zip(task.files, task.stamps, manifest["files"], strict=True)
    read = {
        str(file): (size, version, told["sha256"])
        for file, (_, size, version), told in together
        if _is_shared(source)
    }
    return PreparedSource(target / "rows", source.weight, manifest, read)


def tokenise_share(
    notation: str, config: DataConfig, tokenizer: Tokenizer, key: str, host: tuple[int, int]
) -> None:
    """What a host other than the first does while the first runs `prepare`: tokenise its share of
    the shards of every large source into the shared cache. host: (index, number of hosts). Errors
    are reported by the first host."""
    with contextlib.suppress(UserError):
        check_text(config, [(key, notation)])
        for domain in parse_domains(notation, config.domains, key):
            for source in filter(_is_shared, domain.sources):
                task = _task(source, tokenizer, config)
                if not is_there(task.target):
                    with task.shards(host) as shards:
                        shards.finish_own()
                    if is_there(task.target):  # the first host did not wait for this one
                        discard(task.folder)


def _is_shared(source: Source) -> bool:
    """Whether several hosts share the tokenisation of a source; not if one process must generate or
    download it first."""
    return not source.where.startswith(("demo:", "tfds:"))


def _stamp(file: File) -> list[Any]:
    """[path, size, version]: the version changes when the content does; on a disk it is the time of
    the last change."""
    if not isinstance(file, Path):
        return file.stamp()
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def changed_text(config: DataConfig, read: Mapping[str, Sequence[Any]]) -> list[str]:
    """What has changed in the files of config.train, one line each. read: `PreparedSource.files` of
    all its sources, when they were prepared. A file is read only if its version has changed and its
    size has not. Raises UserError if a source has no file left."""
    sources = [
        source
        for domain in parse_domains(config.train, config.domains, "config.data.train")
        for source in filter(_is_shared, domain.sources)
    ]
    now = {str(file): file for source in sources for file in expand_files(source)}

    def differs(name: str) -> bool:
        size, version, sha256 = read[name]
        _, new_size, new_version = _stamp(now[name])
        if (new_size, new_version) == (size, version):
            return False
        return new_size != size or _sha256(_at_hand(now[name])) != sha256

    told = {name: "is missing" for name in read if name not in now}
    told |= {name: "is new" for name in now if name not in read}
    told |= {name: "has changed" for name in now if name in read and differs(name)}
    return [f"{name} {what}" for name, what in told.items()]


def _at_hand(file: File) -> File:
    """The file in the form that is fastest to read: Parquet files on the Hub are read over the
    network, column by column; all other files there are downloaded."""
    return file.downloaded() if isinstance(file, HubFile) and file.suffix != ".parquet" else file


def _sha256(file: File) -> str:
    return sha256_of_file(file) if isinstance(file, Path) else file.sha256()


def _write(task: _Task, hosts: int) -> None:
    source, files, stamps, tokenizer, config, target = task
    sweep_stale(cache_of(config))
    merged = _Merged(config.sequence_length)
    total = sum(map(size_of, files))
    unknown = not files or any(f.suffix in (*COMPRESSIONS, ".parquet") for f in files)

    def manifest() -> dict[str, Any]:
        told = {
            "format": FORMAT,
            "source": source.where,
            "field": source.field,
            "files": [
                {"path": str(f), "bytes": size_of(f), "sha256": _sha256(_at_hand(f))} for f in files
            ],
            "tokenizer_sha256": tokenizer.sha256,
            "sequence_length": config.sequence_length,
            "heldout_fraction": config.heldout_fraction,
            "heldout_from": [order / 2**64 for order in merged.orders],
            "splits": merged.counts,
            "problems": {
                kind: [count, merged.problems().first[kind]]
                for kind, count in merged.problems().counts.items()
            },
        }
        if [*map(_stamp, files)] != stamps:
            raise UserError(
                f"{source.where}: changed while it was being read; run the same command again"
            )
        return told

    try:
        with (
            task.shards((0, hosts)) as shards,
            bar(
                total=None if unknown else total,
                unit="B",
                unit_scale=True,
                desc=f"tokenise {plain(Path(source.where).name)}",
                leave=False,
                shown=is_first(),
            ) as progress,
        ):
            # TFDS rejects a split without rows.
            started: dict[str, Iterator[dict[str, np.ndarray]]] = {}
            for split in SPLITS:
                rows = merged.rows(split, shards, progress)
                if (first := next(rows, None)) is not None:
                    started[split] = itertools.chain([first], rows)
            if "train" not in started:
                causes = merged.problems().lines() or ["no document has a token to predict"]
                if "heldout" in started:
                    causes = [all_heldout(merged.orders, config.heldout_fraction)]
                raise UserError(
                    f"config.data: {source.where} yields no document to train on:"
                    f" {'; '.join(causes)}"
                )
            write_set(target, started, config.sequence_length, manifest)
    except UserError as error:
        if not isinstance(error, WorkerEnded):
            discard(task.folder)
        raise
    discard(task.folder)


class _Merged:
    """Counts and problems of a source's shards, merged as they arrive."""

    def __init__(self, sequence_length: int):
        self._length = sequence_length
        self.counts = {split: no_counts() for split in SPLITS}
        self.orders: list[int] = []
        self._told: list[tuple[Told, int]] = []  # with the shard's number
        self._first_row = dict.fromkeys(SPLITS, math.inf)  # number of the document that fills it

    def rows(self, split: str, shards: Shards, progress: tqdm) -> Iterator[dict[str, np.ndarray]]:
        def parts() -> Iterator[Columns]:
            tokens, count = 0, 0
            for number, (counts, part) in enumerate(shards.each(split)):
                if split == SPLITS[0]:
                    self._add(counts, number)
                    progress.update(counts.characters)
                if (short := self._length + 1 - tokens) > 0:
                    ends = part.lengths.cumsum()
                    filled = int(np.searchsorted(ends, short))
                    if filled < len(ends):
                        self._first_row[split] = count + filled
                tokens, count = tokens + len(part.tokens), count + len(part.lengths)
                yield part

        for row in documents.rows(parts(), self._length):
            self.counts[split]["rows"] += 1
            yield row

    def _add(self, counts: Counts, number: int) -> None:
        """Add the counts of the next shard, number `number`."""
        before = {split: self.counts[split]["documents"] for split in SPLITS}
        for told in counts.told:
            at = before[told.split] + told.documents
            self._told.append((told._replace(documents=at), number))
        if both := (*self.orders, *counts.orders):
            self.orders = [min(both), max(both)]
        for split, more in counts.splits.items():
            ours = self.counts[split]
            ours["largest_id"] = max(ours["largest_id"], more["largest_id"])
            for key in ("documents", "tokens", "bytes"):
                ours[key] += more[key]

    def problems(self) -> Problems:
        """Problems in the order in which rows are used: up to the first row of each split, then the
        rest of train, then the rest of the held-out split."""

        def place(entry: tuple[Told, int]) -> tuple[int, int, int, int]:
            told, number = entry
            late = told.documents > self._first_row[told.split]
            return late, SPLITS.index(told.split), number, told.item

        problems = Problems()
        for told, _ in sorted(self._told, key=place):
            problems.add(told.kind, told.place, told.times)
        return problems


def cache_of(config: DataConfig) -> Path:
    return to_path(config.cache, "config.data.cache")


def resolve_tokenizer(config: DataConfig, checkpoint_tokenizer: Path | None) -> Tokenizer:
    """The config's tokenizer, or else that of the checkpoint from which the run starts. Raises
    UserError when there is neither."""
    if config.tokenizer == DEMO:
        found = load_tokenizer(demo.tokenizer(cache_of(config)))
    elif config.tokenizer:
        found = named_tokenizer(config.tokenizer, "config.data.tokenizer")
    elif checkpoint_tokenizer is None:
        raise UserError(
            "config.data.tokenizer: missing, and there is no initial checkpoint to take it"
            " from; name a .model or tokenizer.json"
        )
    else:
        found = load_tokenizer(checkpoint_tokenizer)
    return found if config.bos == "auto" else found.with_bos(config.bos == "always")


def texts(config: DataConfig) -> list[tuple[str, str]]:
    """(key, notation) of all training and held-out text."""
    named = [("config.data.train", config.train), ("config.data.heldout", config.heldout)]
    return [(key, notation) for key, notation in named if notation or key == "config.data.train"]


def check_text(config: DataConfig, notations: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError with everything known to be wrong before any text is read: names, formats
    and missing files. notations: as returned by `texts`."""
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
    notation: str, config: DataConfig, tokenizer: Tokenizer, key: str, hosts: int = 1
) -> tuple[PreparedDomain, ...]:
    """Tokenise every source of every domain of `notation`. This is slow on the first run; later
    runs find everything in the cache. hosts: as for prepare_source."""
    check_text(config, [(key, notation)])
    prepared = tuple(
        PreparedDomain(
            d.name, d.weight, tuple(prepare_source(s, tokenizer, config, hosts) for s in d.sources)
        )
        for d in parse_domains(notation, config.domains, key)
    )
    tell_problems([source for domain in prepared for source in domain.sources], key)
    return prepared


def already_prepared(
    notation: str, config: DataConfig, tokenizer: Tokenizer | None, key: str
) -> list[tuple[Domain, list[Mapping[str, Any] | None]]]:
    """Every domain of `notation`, with the manifest of each of its sources, None for those not in
    the cache. tokenizer: None if it does not exist yet."""

    def manifest(source: Source) -> Mapping[str, Any] | None:
        return read_manifest(_task(source, tokenizer, config).target) if tokenizer else None

    domains = parse_domains(notation, config.domains, key)
    return [(domain, [*map(manifest, domain.sources)]) for domain in domains]


def shared_text(
    found: Iterable[tuple[Domain, Sequence[Mapping[str, Any] | None]]],
) -> Iterator[str]:
    """Yield a warning for each pair of domains that have a file in common: the same file or, once
    they are prepared, files of the same content. found: as returned by `already_prepared`."""
    owners: dict[tuple[str, str], tuple[str, str]] = {}  # (path or sha256, field) -> domain, file
    shared: dict[tuple[str, str], list[str]] = {}
    for domain, manifests in found:
        for source, manifest in zip(domain.sources, manifests, strict=True):
            files = expand_files(source) if _is_shared(source) else []
            sums = [told["sha256"] for told in manifest["files"]] if manifest else [""] * len(files)
            for file, sha256 in zip(files, sums, strict=False):  # no files for demo:, tfds:
                if not size_of(file):
                    continue
                keys = [(key, source.field) for key in (_stamp(file)[0], sha256) if key]
                owner, other = next((owners[k] for k in keys if k in owners), (domain.name, ""))
                if owner != domain.name:
                    same = str(file) if str(file) == other else f"{other} is {file}"
                    shared.setdefault((owner, domain.name), []).append(same)
                owners |= {key: (domain.name, str(file)) for key in keys if key not in owners}
    for (first, second), files_told in shared.items():
        more = f" and {len(files_told) - 1} more" if files_told[1:] else ""
        yield (
            f"{first} and {second} share text ({files_told[0]}{more}), so their experts will be"
            " similar and the text counts twice in the finetune; keep it in one domain only"
        )


def prepare_by_all(
    notation: str, config: DataConfig, tokenizer: Tokenizer, key: str
) -> tuple[PreparedDomain, ...]:
    """`prepare` by all processes of a run: the first makes the sets, and all of them tokenise."""
    count = jax.process_count()
    if not is_first():
        tokenise_share(notation, config, tokenizer, key, (jax.process_index(), count))
    return first_then_others(prepare, notation, config, tokenizer, key, count)


_told: set[Path] = set()  # sources whose problems this process has already logged


def tell_problems(sources: Sequence[PreparedSource], key: str) -> None:
    """Log what had to be skipped or truncated, summed by kind, once per source and process."""
    new = {source.directory: source for source in sources if source.directory not in _told}
    _told.update(new)
    together = Problems()
    for source in new.values():
        for kind, (count, first) in source.manifest["problems"].items():
            together.add(kind, first, count)
    for line in together.lines():
        log.warning("%s: %s", key, line)
