"""Text files in a bucket, read in place: only the required columns of Parquet files."""

import dataclasses
import glob
import hashlib
import io
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from btx_jax import buckets
from btx_jax.errors import UserError

AHEAD = 2**23  # bytes to fetch at a time when a file is read sequentially


@dataclasses.dataclass(frozen=True)
class BucketFile:
    """A file in a bucket. version: changes whenever the content does."""

    path: Path
    size: int
    version: str

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def open(self, in_pieces: bool = False) -> BinaryIO:
        """Open the file. in_pieces: fetch only what is read, for readers that seek."""
        key = buckets.key_of(self.path)
        stream = cast(Any, self.path).fs.open(key, "rb", block_size=AHEAD, cache_type="none")
        return stream if in_pieces else io.BufferedReader(stream, AHEAD)

    def stamp(self) -> list[Any]:
        """Values that change when the content does."""
        return [str(self.path), self.size, self.version]

    def sha256(self) -> str:
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def find_files(where: str, key: str) -> list[BucketFile]:
    """Files matching `gs://BUCKET/GLOB`, sorted. Raises UserError, naming the key, when there are
    none."""
    path = buckets.at(where, key)
    buckets.require(path, key)
    files = cast(Any, path).fs
    with buckets.explained(key):
        pattern = buckets.key_of(path)
        if not glob.has_magic(pattern) and files.isdir(pattern):
            raise UserError(
                f"{key}: {where!r} is a directory; name its files, such as '{where}/*.jsonl'"
            )
        found = files.glob(pattern, detail=True)
    scheme = where.partition("://")[0]
    chosen = [name for name, info in sorted(found.items()) if info["type"] == "file"]
    if not chosen:
        raise UserError(f"{key}: no file matches {where!r}; check the path (globs are allowed)")
    return [
        BucketFile(
            buckets.at(f"{scheme}://{name}", key),
            int(found[name]["size"]),
            str(found[name].get("generation") or found[name].get("ETag")),
        )
        for name in chosen
    ]
