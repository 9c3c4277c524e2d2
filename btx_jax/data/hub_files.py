"""Data set files on the Hugging Face Hub, read in place: only the required columns of Parquet
files, and only as many lines as needed."""

import dataclasses
import functools
import hashlib
import io
import os
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from btx_jax.errors import UserError
from btx_jax.hub import commit, download_file, listing
from btx_jax.hub_errors import told
from btx_jax.hub_names import PROTOCOL, Name, matches, named

AHEAD = 2**20  # bytes to fetch at a time when a file is read sequentially


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file on the Hub. at: its location, with the commit as revision. blob: git's hash of its
    content. local: its downloaded copy; None to read over the network."""

    at: Name
    size: int
    blob: str
    local: Path | None = None

    def __str__(self) -> str:
        return f"{PROTOCOL}{self.at}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.at.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.at.path).suffix

    def open(self, in_pieces: bool = False) -> BinaryIO:
        """Open the file. in_pieces: fetch only what is read, for readers that seek."""
        if self.local:
            return self.local.open("rb")
        stream = _Stream(self)
        return stream if in_pieces else io.BufferedReader(stream, AHEAD)  # type: ignore[return-value]

    def downloaded(self) -> "HubFile":
        """This file downloaded to the local cache, for readers that need all of it more than
        once."""
        return dataclasses.replace(self, local=download_file(self.at, str(self)))

    def stamp(self) -> list[Any]:
        """Values that change when the content does, independent of the commit."""
        return [f"{PROTOCOL}{self.at._replace(revision='')}", self.size, self.blob]

    def sha256(self) -> str:
        """sha256 of the content; for large files as stated by the Hub."""
        from huggingface_hub import HfApi

        if self.local is None:
            with told(self.at, str(self)):
                (info,) = HfApi().get_paths_info(
                    self.at.repo, self.at.path, revision=self.at.revision, repo_type=self.at.type
                )
            if lfs := getattr(info, "lfs", None):
                return str(lfs.sha256)
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def is_on_hub(where: str) -> bool:
    return where.startswith(PROTOCOL)


def find_files(where: str, key: str) -> list[HubFile]:
    """Files matching `hf://datasets/org/name[@REVISION]/GLOB`, sorted. Raises UserError, naming the
    key, when there are none."""
    found = named(where, key)
    if found is None or found.type != "dataset" or not found.path:
        raise UserError(
            f"{key}: {where!r} names no files; write hf://datasets/org/name/GLOB, for example"
            " 'hf://datasets/org/name/data/*.parquet'"
        )
    at = found._replace(revision=commit(found, key))
    files = listing(at, key)
    chosen = sorted(path for path in files if matches(path, found.path))
    if chosen:
        return [HubFile(at._replace(path=path), *files[path]) for path in chosen]
    shown = [path for path in sorted(files) if not os.path.basename(path).startswith(".")]
    raise UserError(
        f"{key}: no file in {found.repository} matches {found.path!r}; it has"
        f" {', '.join(shown[:8])}{', ...' if shown[8:] else ''}"
    )


class _Stream(io.RawIOBase):
    """A file read in ranges. Raises UserError when the Hub, or the connection to it, fails."""

    def __init__(self, file: HubFile):
        self._file = file
        with told(file.at, str(file)):
            self._remote = _file_system().open(str(file), block_size=AHEAD, cache_type="none")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._remote.seek(offset, whence)

    def tell(self) -> int:
        return self._remote.tell()

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._file.size - self.tell())
        if count <= 0:
            return 0
        with told(self._file.at, str(self._file)):
            data = self._remote.read(count)
        if not data:
            raise UserError(f"{self._file}: the download ended early; run the same command again")
        buffer[: len(data)] = data
        return len(data)


def _file_system() -> Any:
    from huggingface_hub import constants

    return _file_system_of(constants.ENDPOINT)


@functools.cache
def _file_system_of(endpoint: str) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint)
