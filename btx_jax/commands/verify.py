"""Read everything stored in a directory and compare it with its checksums."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from btx_jax import buckets, hub, hub_names
from btx_jax.architectures.values import is_finite
from btx_jax.checkpoints import adapter, peft_config
from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from btx_jax.checkpoints.checksums import SUMS, check_sums, file_sha256, read_sums
from btx_jax.checkpoints.huggingface import HuggingFaceReader, is_huggingface
from btx_jax.checkpoints.router_statistics import FILE as STATISTICS
from btx_jax.checkpoints.router_statistics import RouterStatistics
from btx_jax.checkpoints.safetensors_files import DTYPES, SafetensorsFile, read_checksums
from btx_jax.checkpoints.training_state import (
    DIRECTORY,
    Base,
    items_of,
    quiet,
    read_metadata,
    steps_of,
    verify_item,
)
from btx_jax.errors import UserError
from btx_jax.progress import bar
from btx_jax.reporting.metrics import FILE as METRICS
from btx_jax.reporting.metrics import bad_lines, parts
from btx_jax.rundir import CONFIG
from btx_jax.terminal import counted


class Finding(NamedTuple):
    """Result of one check. told: what was checked, or what is wrong."""

    name: str
    told: str
    good: bool


def verify(path: str) -> Iterator[Finding]:
    """Yield the findings for everything stored in a directory: a pipeline's or a run's (all steps),
    a single step's, a Hugging Face directory, or an adapter, btx_jax's or peft's. Raises UserError
    for anything else."""
    quiet()
    directory = hub.resolve(path, "PATH")
    if not directory.is_dir():
        raise UserError(f"PATH: {directory} is not a directory")
    buckets.require_whole(directory, "PATH")
    found = False
    for finding in _verify(directory.resolve()):
        found = True
        yield finding
    if not found:
        raise UserError(
            f"PATH: {directory} contains nothing to verify; name a run, a step, a Hugging Face"
            " directory or an adapter"
        )


def _verify(directory: Path) -> Iterator[Finding]:
    yield from _blobs(directory) if hub_names.origin(directory) else _sums(directory)
    if (directory / STATISTICS).is_file():
        yield _check(STATISTICS, lambda: _statistics(directory / STATISTICS))
    if (directory / peft_config.CONFIG).is_file():
        yield _check(peft_config.TENSORS, lambda: _tensors(directory / peft_config.TENSORS))
    elif any((directory / name).is_file() for name in (adapter.ABOUT, adapter.TENSORS)):
        yield _check(adapter.TENSORS, lambda: _adapter(directory))
    elif (directory / DIRECTORY).is_dir():
        yield from _run(directory)
    elif (directory / "params").is_dir() or (directory / "about").is_dir():
        yield from _step(directory, directory.name)
    elif is_huggingface(directory) and '"model_type"' in (directory / "config.json").read_text(
        "utf-8", "replace"
    ):
        yield _check("tensors", lambda: _model(directory))
    else:
        for run in sorted(path for path in directory.iterdir() if (path / DIRECTORY).is_dir()):
            for finding in _run(run):
                yield finding._replace(name=f"{run.name}/{finding.name}")


def _check(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, check(), True)
    except UserError as error:
        return Finding(name, str(error), False)


def _run(directory: Path) -> Iterator[Finding]:
    for step in steps_of(directory / DIRECTORY):
        yield from _step(directory / DIRECTORY / str(step), f"step {step}")
    if not (directory / "tokenizer").is_dir() and _is_training(directory):
        cure = "copy it from the run's initial checkpoint, or from an export of the run"
        yield Finding("tokenizer", f"{directory / 'tokenizer'} is missing: {cure}", False)
    for finding in _sums(directory / "tokenizer"):
        yield finding._replace(name=f"tokenizer/{finding.name}")
    if parts(directory):
        yield _check(METRICS, lambda: _metrics(directory))


def _is_training(directory: Path) -> bool:
    """Whether the directory is known to be a training run, which always has a tokenizer. A run that
    was converted, or mixed from adapters, may never have had one."""
    try:
        return json.loads((directory / CONFIG).read_text(encoding="utf-8"))["stage"] == "train"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _step(path: Path, name: str) -> Iterator[Finding]:
    for item in items_of(path):
        yield _check(f"{name}, {item}", lambda item=item: verify_item(path, item))  # type: ignore[misc]
    try:
        metadata = read_metadata(path)
    except UserError:  # reported above
        return
    if (base := metadata.base) and not metadata.model.lora:
        yield _check(f"{name}, base", lambda: _base(path, base))


def _base(path: Path, base: Base) -> str:
    """Compare a branch's base with its digest."""
    open_reader(find_checkpoint(path, "PATH")).check()
    return f"digest of {base.path}"


def _metrics(directory: Path) -> str:
    if bad := bad_lines(directory):
        raise UserError(
            f"{directory / METRICS} is damaged (line {bad[0]}); resuming the run sets the line"
            " aside"
        )
    return "all lines are valid"


def _sums(directory: Path) -> Iterator[Finding]:
    def check(name: str) -> str:
        check_sums(directory, [name])
        return "sha256"

    try:
        names = read_sums(directory)
    except UserError as error:
        yield Finding(SUMS, str(error), False)
        return
    for name in bar(names, desc=SUMS, unit="file", leave=False):
        yield _check(name, lambda name=name: check(name))  # type: ignore[misc]


def _blobs(directory: Path) -> Iterator[Finding]:
    """Check a snapshot from the Hub, in which large files are named after their sha256."""

    def check(path: Path) -> str:
        if file_sha256(path) != os.path.basename(os.readlink(path)):
            raise UserError(
                f"{path} is damaged (sha256): delete {path.resolve()} and download it again"
            )
        return "sha256 given by the Hub"

    links = [path for path in directory.iterdir() if path.is_symlink()]
    large = [path for path in links if len(os.path.basename(os.readlink(path))) == 64]
    for path in bar(sorted(large), desc="sha256", unit="file", leave=False):
        yield _check(path.name, lambda path=path: check(path))  # type: ignore[misc]


def _model(directory: Path) -> str:
    reader = HuggingFaceReader(directory)
    for tensor in bar(reader.slots, desc="reading", unit="tensor", leave=False):
        reader.read(tensor)
    reader.check()
    how = "checksums" if read_checksums(directory) else "no checksums; structure"
    return f"{how}, finite values: {counted(len(reader.slots), 'tensor')}"


def _adapter(directory: Path) -> str:
    adapter.read_directory(directory, adapter.read_metadata(directory).model)
    values = json.loads((directory / adapter.ABOUT).read_text(encoding="utf-8"))
    how = "checksums" if "tensors_sha256" in values else "no checksums; structure"
    return f"{how}, finite values"


def _statistics(path: Path) -> str:
    about = RouterStatistics(path).about
    experts, layers = counted(len(about.experts), "expert"), counted(len(about.layers), "layer")
    return f"checksum: {experts} in {layers}"


def _tensors(path: Path) -> str:
    file = SafetensorsFile(path)
    for name, tensor in file.tensors.items():
        if tensor.dtype in DTYPES and not is_finite(file.read(name)):
            raise UserError(f"{path}: NaN or infinity in {name}")
    return f"structure, finite values: {counted(len(file.tensors), 'tensor')}"
