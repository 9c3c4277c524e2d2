"""Checksums for data that is not stored in chunks with checksums of their own: JSON that contains
its checksum, and sha256 of a directory's files in the format of `sha256sum -c`."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from btx_jax.errors import UserError
from btx_jax.output import new_file

SEAL = "sha256"
SUMS = "SHA256SUMS"
_FREE = ("README.md", "adapter.json", SUMS)  # may be edited; has its own seal; this file itself


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with a sha256 over its other values added."""
    return {**values, SEAL: _seal(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its sha256. Raises ValueError when the sha256 does not match."""
    rest = {key: value for key, value in values.items() if key != SEAL}
    if values.get(SEAL) != _seal(rest):
        raise ValueError("checksum")
    return rest


def _seal(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS for the files directly in the directory. known: file name -> sha256 of files
    already hashed while writing."""
    known = known or {}
    files = (path.name for path in directory.iterdir() if path.is_file())
    names = sorted(name for name in files if name not in _FREE and not name.startswith("."))
    text = "".join(f"{known.get(n) or file_sha256(directory / n)}  {n}\n" for n in names)
    with new_file(directory / SUMS) as partial:
        partial.write_text(text, encoding="utf-8")


def read_sums(directory: Path) -> dict[str, str]:
    """Read SHA256SUMS: file name -> sha256; empty without such a file. Raises UserError."""
    path = directory / SUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sums = {name: total for total, name in (line.split("  ", 1) for line in lines)}
        if not sums:
            raise ValueError("empty")
        return sums
    except ValueError as error:
        raise UserError(
            f"{path} is damaged; delete it to continue without its checksums"
        ) from error


def check_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare files (those in `names`, or all) with SHA256SUMS, as far as it lists them. Raises
    UserError when one is missing or differs."""
    sums = read_sums(directory)
    for name in sums if names is None else names:
        if name not in sums:
            continue
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} is missing but listed in {SUMS}: download or export it"
                " again, or delete its line there"
            )
        if file_sha256(directory / name) != sums[name]:
            raise UserError(
                f"{directory / name} is damaged (sha256, {SUMS}): download or export it again; or,"
                " if it was changed on purpose, delete its line there"
            )
