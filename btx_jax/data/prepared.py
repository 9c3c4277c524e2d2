"""Prepared sets on disk (an ArrayRecord TFDS data set of rows, with a manifest) and the domains
that they make up."""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_feature_pb2

from btx_jax.buckets import local_copy
from btx_jax.errors import UserError
from btx_jax.output import is_there, new_directory, remove, sweep

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """A tokenised source on disk. manifest: hashes of tokenizer and source, counts by split,
    problems, and `heldout_from`: the held-out shares above which its first and its last document
    are held out. files: name -> (size in bytes, version, sha256) of each file it was made from;
    empty for text that is generated or downloaded (demo:, tfds:)."""

    directory: Path
    weight: float
    manifest: dict[str, Any]
    files: Mapping[str, tuple[Any, ...]]

    def rows(self, split: str) -> int:
        return self.manifest["splits"][split]["rows"]

    def open(self, split: str) -> Any:
        """Random access to {tokens, segments: [sequence + 1] int32, bytes: []}, for grain. Reading
        a damaged row raises UserError."""
        builder = tfds.builder_from_directory(str(local_copy(self.directory)))
        return _Rows(builder.as_data_source(split=split), self.directory.parent)


class _Rows:
    """Rows of one split of a prepared set."""

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
                " delete that directory and run the same command to prepare its text again"
            ) from error


@dataclasses.dataclass(frozen=True)
class PreparedDomain:
    name: str
    weight: float
    sources: tuple[PreparedSource, ...]

    def largest_id(self) -> int:
        """The largest token id in its rows; -1 without rows."""
        splits = (s for source in self.sources for s in source.manifest["splits"].values())
        return max(split["largest_id"] for split in splits)

    def identity(self) -> str:
        """A hash of the data from which the domain's rows are made, independent of where its files
        are."""
        made = [(source.manifest, source.weight) for source in self.sources]
        told = [
            [[file["sha256"] for file in m["files"]], m["field"], m["splits"], weight]
            for m, weight in made
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def none_heldout(domain: PreparedDomain) -> str:
    """Why a domain has no held-out rows, and how to get some."""
    manifests = [source.manifest for source in domain.sources]
    told = f"domain {domain.name!r} has no held-out document"
    fraction = manifests[0]["heldout_fraction"]
    if any(m["splits"]["heldout"]["documents"] for m in manifests):
        return (
            f"{told} with a token to predict: its held-out documents are empty or have one"
            " token; give longer ones"
        )
    count = sum(m["splits"]["train"]["documents"] for m in manifests)
    if not (share := heldout_share(domain)):
        return f"{told}: {ONE_DOCUMENT}"
    return (
        f"{told}: config.data.heldout_fraction={fraction:g} holds out none of its {count}; set"
        f" it to at least {share:g}, in every run that reads this text"
    )


def heldout_share(domain: PreparedDomain) -> float:
    """The smallest data.heldout_fraction that holds out a document of the domain; 0 if there is
    only one document."""
    orders = [source.manifest["heldout_from"] for source in domain.sources]
    first = min(least for least, _ in orders)
    return 0.0 if first == max(most for _, most in orders) else _above(first)


ONE_DOCUMENT = (
    "its text is a single document, which is held out whole or not at all; split it, for"
    " example into one document per line of a .jsonl file"
)


def _above(share: float) -> float:
    """A slightly larger number with few digits, below 1."""
    digits = 1 - math.floor(math.log10(max(share, 1e-9)))
    above = (math.floor(share * 10**digits) + 1) / 10**digits
    return above if above < 1 else (share + 1) / 2


def all_heldout(orders: list[int], fraction: float) -> str:
    if orders[0] == orders[1]:
        return f"everything is held out: {ONE_DOCUMENT}"
    below = math.floor(orders[1] / 2**64 * 1e4) / 1e4
    return (
        f"config.data.heldout_fraction={fraction:g} holds out every document; lower it to less than"
        f" {below:g}"
    )


class PackedText(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder that `write_set` uses."""

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


class Serializer:
    """Serialises rows of integers as tf.train.Example. TFDS's serializer takes three times as long,
    most of the cost of writing, and leaves the order of features, and thus the bytes, undefined."""

    def __init__(self, example_specs: Any):
        self.example_specs = example_specs

    def serialize_example(self, example: Mapping[str, np.ndarray]) -> bytes:
        """A row, features by name, as a serialised tf.train.Example."""
        entries = (
            _field(1, name.encode()) + _field(2, _field(3, _integers(np.ravel(example[name]))))
            for name in sorted(example)
        )
        return _field(1, b"".join(_field(1, entry) for entry in entries))


def _integers(values: np.ndarray) -> bytes:
    """Values as a tf.train.Int64List."""
    if values.size and values.min() >= 0 and values.max() < 128:
        return _field(1, values.astype(np.uint8).tobytes())
    return tf_feature_pb2.Int64List(value=values.tolist()).SerializeToString()


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message: bytes, a string, a message or
    packed numbers."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + data


def write_set(
    target: Path,
    rows: Mapping[str, Iterator[dict[str, np.ndarray]]],
    sequence_length: int,
    manifest: Callable[[], dict[str, Any]],
) -> None:
    """Write a prepared set, completely or not at all. manifest: returns the manifest's values other
    than `rows`; called after all rows are written. Raises UserError when rows or manifest do, and
    when the disk is full."""
    failed: list[UserError] = []

    def watched(of_split: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        try:
            yield from of_split
        except UserError as error:
            failed.append(error)
            raise

    sweep(target.parent)
    with new_directory(target) as temporary:
        builder = PackedText(
            {split: watched(of_split) for split, of_split in rows.items()},
            sequence_length,
            data_dir=str(temporary / "build"),
        )
        try:
            _quietly(builder.download_and_prepare)
        except Exception as error:
            if failed:  # TFDS wraps exceptions of its generator in pages of text
                raise failed[0] from None
            if cause := re.search(r"write\(\) failed: ([^;]*)", str(error)):  # from ArrayRecord
                raise UserError(f"cannot write {target}: {cause[1]}") from error
            raise
        told = manifest()
        rows_at = shutil.move(builder.data_path, temporary / "rows")
        shutil.rmtree(temporary / "build")
        told["rows"] = {
            f.name: {"bytes": f.stat().st_size, "sha256": sha256_of_file(f)}
            for f in sorted(Path(rows_at).iterdir())
        }
        told["sha256"] = sha256_of(told)
        (temporary / MANIFEST).write_text(json.dumps(told, indent=2), encoding="utf-8")


def _quietly(prepare: Any) -> None:
    """Run TFDS with `Serializer`, and without TFDS's own progress bars and advice, which btx_jax
    replaces with its own."""
    tfds.disable_progress_bar()
    absl = logging.getLogger("absl")
    previous = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(example_serializer, "ExampleSerializer", Serializer),
        ):
            prepare()
    finally:
        absl.setLevel(previous)


def read_manifest(target: Path) -> dict[str, Any] | None:
    """The manifest of a prepared set; None if there is none, or if the set is damaged, which is
    then logged and deleted. Small files are compared with their checksums, ArrayRecord files only
    by size, as they are verified when read."""
    if not is_there(target):
        return None
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256", None) != sha256_of(manifest):
            raise ValueError(f"{MANIFEST} has changed since it was written")
        for name, written in manifest["rows"].items():
            file = target / "rows" / name
            if file.stat().st_size != written["bytes"] or (
                file.suffix == ".json" and sha256_of_file(file) != written["sha256"]
            ):
                raise ValueError(f"rows/{name} has changed since it was written")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); preparing its text again", target, error)
        remove(target)
        return None
    return manifest


def sha256_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
