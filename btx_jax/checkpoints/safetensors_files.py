"""Read and write safetensors files one tensor at a time, so that no more than one is in memory.

Format (https://github.com/huggingface/safetensors): 8 bytes, little-endian length of the header;
the header, JSON {name: {dtype, shape, data_offsets}}; the tensors, C order, little-endian, without
gaps. Files are read with pread rather than mapped: mapped pages would count towards this process's
memory until it exits.

Files written by btx_jax come with model.xxh3.json: {tensor: xxh3 of its bytes}. A tensor that is
read whole is verified at the speed of memory, without a sha256 over the whole file. Parts of
tensors, as several processes read them, are not verified; `btx verify` verifies everything.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import xxhash

from btx_jax import buckets
from btx_jax.checkpoints.checksums import SUMS
from btx_jax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
READABLE = DTYPES | {
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in READABLE.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I64", "U64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "model.xxh3.json"
_PIECE = 2**26  # bytes of an object requested at a time
_BLOCK = 2**22  # bytes read at a time, for hashing or for cutting columns from rows


class Tensor(NamedTuple):
    """Location of one tensor. dtype: the format's name, such as BF16. start: byte offset in the
    file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _OnDisk:
    """The bytes of a file. worth_a_call: bytes from which a part is faster to read by a call of its
    own than together with what surrounds it."""

    worth_a_call = 1024

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)

    def fill(self, view: memoryview, start: int) -> bool:
        """Fill `view` from byte `start`; False if the file ends too early."""
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not count:
                return False
            done += count
        return True


class _OnBucket:
    """The bytes of an object in a bucket, read in ranges."""

    worth_a_call = 2**22

    def __init__(self, path: Path):
        self._path = path
        self.size = path.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        with buckets.explained(str(self._path)):
            return buckets.read_range(self._path, start, stop) if stop > start else b""

    def fill(self, view: memoryview, start: int) -> bool:
        """Fill `view` from byte `start`; False if the object ends too early."""
        for at in range(0, len(view), _PIECE):
            part = view[at : at + _PIECE]
            data = self.read(start + at, start + at + len(part))
            if len(data) != len(part):
                return False
            part[:] = data
        return True


class SafetensorsFile:
    """One file with its validated header; tensors are read on demand. Raises UserError for any
    damage."""

    def __init__(self, path: Path):
        self.path = path
        require_regular(path)
        try:
            self._stored = _OnBucket(path) if buckets.is_on_bucket(path) else _OnDisk(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        self.metadata: dict[str, str] = {}
        self.tensors = self._read_header()
        self._checksums = read_checksums(path.parent)

    def _read_header(self) -> dict[str, Tensor]:
        size = self._stored.size
        length = int.from_bytes(self._stored.read(0, min(size, 8)), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{self.path}: truncated or not a safetensors file ({size} bytes, header of"
                f" {length})"
            )
        try:
            header = json.loads(self._stored.read(8, 8 + length), object_pairs_hook=_unique)
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self.metadata = dict(header.get("__metadata__") or {})
            tensors, end = {}, 0
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                begin, stop = entry["data_offsets"]
                shape = tuple(entry["shape"])
                if not all(type(number) is int and number >= 0 for number in (begin, stop, *shape)):
                    raise UserError(
                        f"{self.path}: damaged header: shape or offsets of {name} are not whole"
                        " numbers"
                    )
                bits = math.prod(shape) * _BITS[entry["dtype"]]
                if begin != end or (stop - begin) * 8 != bits:
                    raise UserError(
                        f"{self.path}: damaged header: {name} is not where its shape {shape} says"
                    )
                tensors[name], end = (
                    Tensor(entry["dtype"], shape, 8 + length + begin, stop - begin),
                    stop,
                )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path}: damaged header: {error}") from error
        if size != 8 + length + end:
            raise UserError(
                f"{self.path}: truncated: {size} bytes, its header describes {8 + length + end};"
                " download it again"
            )
        return tensors

    def read(
        self,
        name: str,
        index: int | None = None,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """A tensor, its entry [index], or rows and columns [start, stop) of that. Only a tensor
        read as a whole is compared with its checksum."""
        tensor = self.tensors[name]
        dtype, shape, start = READABLE[tensor.dtype], tensor.shape, tensor.start
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * dtype.itemsize
        if rows is not None:
            start += rows[0] * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        if columns is not None and columns != (0, shape[1]):
            return self._columns(start, shape, dtype, columns)
        array = np.empty(shape, dtype)
        self._fill(array, start)
        whole = array.nbytes == tensor.nbytes
        known = self._checksums.get(name) if whole else None
        if known is not None and known != xxhash.xxh3_64_hexdigest(_bytes(array)):
            raise UserError(
                f"{self.path} is damaged ({name}, checksum): download or export it again; or, if it"
                f" was changed on purpose, delete {CHECKSUMS} and {SUMS} beside it"
            )
        return array

    def sha256(self) -> str:
        """sha256 of the bytes of all tensors, in stored order."""
        total = hashlib.sha256()
        start = min((tensor.start for tensor in self.tensors.values()), default=self._stored.size)
        for begin in range(start, self._stored.size, _BLOCK):
            total.update(self._stored.read(begin, min(begin + _BLOCK, self._stored.size)))
        return total.hexdigest()

    def _fill(self, array: np.ndarray, start: int) -> None:
        if not self._stored.fill(_bytes(array), start):
            raise UserError(
                f"{self.path}: became shorter after it was opened; do not change it"
                " while it is read"
            )

    def _columns(
        self, start: int, shape: tuple[int, ...], dtype: np.dtype, columns: tuple[int, int]
    ) -> np.ndarray:
        """Columns of the [rows, columns] array that begins at byte `start`. Read row by row if a
        row's part is worth a call, otherwise cut from blocks of whole rows."""
        first, last = columns
        stride = shape[1] * dtype.itemsize
        array = np.empty((shape[0], last - first), dtype)
        if array[:1].nbytes >= self._stored.worth_a_call:
            for number, row in enumerate(array):
                self._fill(row, start + number * stride + first * dtype.itemsize)
            return array
        step = max(1, _BLOCK // max(stride, 1))
        for row in range(0, shape[0], step):
            block = np.empty((min(step, shape[0] - row), shape[1]), dtype)
            self._fill(block, start + row * stride)
            array[row : row + step] = block[:, first:last]
        return array


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def require_regular(path: Path) -> None:
    """Raise UserError for a pipe, a device or a directory: reading one may never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


def read_checksums(directory: Path) -> dict[str, str]:
    """Tensor name -> xxh3 of its bytes; empty if there is no checksum file. Raises UserError."""
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; download or export it again") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key} twice")
        result[key] = value
    return result


class ShardWriter:
    """Writes tensors, in the order announced, into shards of at most `shard_bytes` (or one tensor).

    tensors: name -> (shape, dtype). metadata: stored in every header. sha256: file name -> sha256
    of every finished file. Every shard's header is known in advance, so data is written as it
    arrives.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[Sequence[int], np.dtype]],
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ):
        self._directory = directory
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards: list[dict[str, tuple[Sequence[int], np.dtype]]] = [{}]
        self.total_bytes, filled = 0, 0
        for name, (shape, dtype) in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if filled and filled + nbytes > shard_bytes:
                self._shards.append({})
                filled = 0
            self._shards[-1][name] = (shape, dtype)
            filled += nbytes
            self.total_bytes += nbytes
        self._pending = [
            (number, name) for number, shard in enumerate(self._shards) for name in shard
        ]
        self._file: Any = None
        self._checksums: dict[str, str] = {}
        self.sha256: dict[str, str] = {}
        self._sum, self._summer = hashlib.sha256(), ThreadPoolExecutor(1)
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future | None = None

    def _name(self, number: int) -> str:
        return (
            SINGLE
            if len(self._shards) == 1
            else f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
        )

    def _open(self, number: int) -> None:
        self._close()
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        for name, (shape, dtype) in self._shards[number].items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self._file = (self._directory / self._name(number)).open("wb", buffering=0)
        self._sum = hashlib.sha256()
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, data) -> None:
        view = memoryview(data)
        summed = self._summer.submit(self._sum.update, view)  # runs on another core
        while len(view):
            view = view[self._file.write(view) :]
        summed.result()

    def _flush_behind(self) -> None:
        """Flush to disk while tensors are being made: otherwise gigabytes wait for the final
        fsync."""
        if self._flush is None or self._flush.done():
            if self._flush is not None:
                self._flush.result()  # the kernel reports a failed write only once
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())

    def _close(self) -> None:
        if self._flush is not None:
            self._flush.result()
            self._flush = None
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self.sha256[Path(self._file.name).name] = self._sum.hexdigest()
            self._file = None

    def write(self, name: str, array: np.ndarray) -> None:
        number, expected = self._pending.pop(0)
        shape, dtype = self._shards[number][expected]
        assert (name, array.shape, array.dtype) == (expected, tuple(shape), dtype), (
            name,
            array.shape,
            array.dtype,
            expected,
            shape,
        )
        if self._file is None or name == next(iter(self._shards[number])):
            self._open(number)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._checksums[name] = xxhash.xxh3_64_hexdigest(data)
        self._write(data)
        self._flush_behind()

    def finish(self) -> None:
        """Write the last shard, the checksums and, when there are several shards, the index."""
        assert not self._pending, f"{len(self._pending)} tensors were announced but not written"
        self._close()
        (self._directory / CHECKSUMS).write_text(
            json.dumps(self._checksums, indent=0) + "\n", encoding="utf-8"
        )
        if len(self._shards) > 1:
            weight_map = {
                name: self._name(number)
                for number, shard in enumerate(self._shards)
                for name in shard
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
