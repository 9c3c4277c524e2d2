"""Checkpoints of a run, saved and restored with Orbax; no other module uses Orbax.

A run stores them in WORKDIR/checkpoints/STEP/{params, opt_state, data, about}: separate items, so
that a mix can read only the parameters. `about` makes params self-describing: it holds the model
and its training history. The tokenizer is in WORKDIR/tokenizer.

Arrays are stored as zarr version 3 in one OCDBT key-value store per item, params in one chunk per
layer and expert. Every chunk carries its CRC-32C, which TensorStore verifies on every read; OCDBT's
own files have checksums too; `data` and `about` are sealed (checksums.py).
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import re
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import linen as nn
from orbax.checkpoint._src.serialization import tensorstore_utils

from btx_jax import hub_names
from btx_jax.architectures.tensors import Region, Slot, TensorId, slots
from btx_jax.architectures.values import is_finite
from btx_jax.buckets import is_on_bucket
from btx_jax.checkpoints.checksums import SEAL, sealed, unsealed
from btx_jax.checkpoints.problems import raise_problems
from btx_jax.config.config import CheckpointConfig
from btx_jax.config.config_dict import from_dict, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.models.leaves import is_feed_forward
from btx_jax.models.llama import Params, abstract_params
from btx_jax.models.lora import is_adapter, partition
from btx_jax.output import remove
from btx_jax.parallel.hosts import is_first
from btx_jax.progress import bar, clock
from btx_jax.terminal import plain

DIRECTORY = "checkpoints"
FINISHED = "commit_success.txt"  # the last file that Orbax writes into a step on a bucket
DESCRIBED, RESUMED = ("about", "params"), ("opt_state", "data")
FORMAT = 3
UNSEALED = 2  # the format of earlier versions, without checksums, still readable
_LEAVES_HELD = 2  # leaves in memory, for a step in large chunks: the current and the next one


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """The costs of one training run. seconds: time spent in steps, over all of the run's starts,
    without compiling, saving and evaluating. peak_bytes: memory of one step, per chip, according to
    the compiler. after: ids of all runs that led to its initial parameters."""

    tokens: int
    flops: float
    seconds: float
    chips: int
    peak_bytes: int
    after: tuple[str, ...] = ()


History = Mapping[str, TrainingRun | None]  # None: made elsewhere, at unknown cost


def elsewhere(path: Path) -> History:
    """History of a model trained elsewhere, identified only by its location, which on the Hub
    includes the commit."""
    if found := hub_names.origin(path):
        return {str(found): None}
    return {f"{path.name} ({hashlib.sha256(str(path).encode()).hexdigest()[:8]})": None}


def together(histories: Iterable[History]) -> History:
    """Every run in any of the histories, each once."""
    return {name: run for history in histories for name, run in history.items()}


def trained_on(history: History) -> str:
    """Sentences for a model card, each preceded by a space; "" if nothing is known."""
    tokens = sum(run.tokens for run in history.values() if run)
    unknown = [name for name, run in history.items() if run is None]
    told = f" Trained here on {tokens:,.0f} tokens in all, seed included." if tokens else ""
    return told + (f" Training elsewhere is unknown: {', '.join(unknown)}." * bool(unknown))


@dataclasses.dataclass(frozen=True)
class Base:
    """The base of a checkpoint that leaves parameters to it: where it was found, and the sha256
    over its values (`checkpoint.load_base`)."""

    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Description of a checkpoint.

    history: run id -> every training run that led to these parameters, and the models made
    elsewhere that they come from. step: of the last run. base: the model under LoRA experts, or the
    one whose attention, norms and embeddings a branch has kept; the checkpoint then holds only the
    LoRA experts or the branch's feed-forwards. huggingface: what config.json and
    generation_config.json of the original model contain beyond ModelConfig, as {"config": {...},
    "generation_config": {...}}; {} for a model created here.
    """

    model: ModelConfig
    step: int
    history: History
    base: Base | None = None
    huggingface: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def holds(self, path: Sequence[str]) -> bool:
        """Whether the checkpoint itself holds the parameter at this path, rather than its base."""
        if self.model.lora:
            return is_adapter(path)
        return self.base is None or is_feed_forward(path)

    def costs(self, without: History | None = None) -> dict[str, Any]:
        """Costs of all runs except those in `without`. unknown: models made elsewhere, which the
        numbers leave out. critical_seconds: duration of the longest chain of runs that had to wait
        for each other, that is, with branches in parallel. chip_seconds: of all runs together."""
        left = {name: run for name, run in self.history.items() if name not in (without or {})}
        runs = {name: run for name, run in left.items() if run}

        @functools.cache
        def until(name: str) -> float:
            return runs[name].seconds + max(
                (until(before) for before in runs[name].after if before in runs), default=0.0
            )

        return {
            "tokens": sum(run.tokens for run in runs.values()),
            "flops": sum(run.flops for run in runs.values()),
            "chip_seconds": sum(run.seconds * run.chips for run in runs.values()),
            "critical_seconds": max((until(name) for name in runs), default=0.0),
            "peak_bytes": max((run.peak_bytes for run in runs.values()), default=0),
            "unknown": sorted(name for name, run in left.items() if run is None),
        }


def metadata_to_json(metadata: CheckpointMetadata) -> dict[str, Any]:
    base = {"base": to_dict(metadata.base)} if metadata.base else {}
    huggingface = {"huggingface": dict(metadata.huggingface)} if metadata.huggingface else {}
    return (
        {
            "format": FORMAT,
            "model": to_dict(metadata.model),
            "step": metadata.step,
            "history": to_dict(metadata.history),
        }
        | base
        | huggingface
    )


def metadata_from_json(values: dict[str, Any], path: Path) -> CheckpointMetadata:
    if values.get("format") not in (FORMAT, UNSEALED):
        raise UserError(
            f"{path}: checkpoint format {values.get('format')!r}; this version reads {UNSEALED} and"
            f" {FORMAT}"
        )
    history = history_from_json(values["history"], path)
    base = from_dict(Base, values["base"], f"{path}: base") if "base" in values else None
    return CheckpointMetadata(
        from_dict(ModelConfig, values["model"], f"{path}: model"),
        values["step"],
        history,
        base,
        values.get("huggingface", {}),
    )


def history_from_json(values: Mapping[str, Any], path: Path) -> History:
    """Parse a history from the result of to_dict. Raises ConfigError."""
    return {
        name: None if run is None else from_dict(TrainingRun, run, f"{path}: history")
        for name, run in values.items()
    }


def stored(params: Any, metadata: CheckpointMetadata) -> Any:
    """The part of these parameters that the checkpoint holds."""
    return partition(params, metadata.holds)[0]


def quiet() -> None:
    """Silence Orbax, which logs every save at INFO through absl; a run's own log says what users
    need to know. Errors in Orbax's threads are raised again where the save is awaited."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _raised_unseen
    logging.getLogger("asyncio").addFilter(_is_told_nowhere_else)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    target = getattr(failed.thread, "_target", None)
    modules = (type(failed.thread).__module__, getattr(target, "__module__", None) or "")
    if not any(module.startswith("orbax.") for module in modules):
        threading.__excepthook__(failed)


def _raised_unseen(raised: Any) -> None:
    """Ignore reads and writes that end because Orbax gave up after another one failed."""
    code = getattr(raised.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
    if not of_orbax and str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def _is_told_nowhere_else(record: logging.LogRecord) -> bool:
    """Filter asyncio's log: drop Orbax's reads and writes that failed along with another one, whose
    error is raised."""
    failed = record.exc_info[2] if record.exc_info else None
    frames = traceback.extract_tb(failed)
    return not any("orbax" in Path(frame.filename).parts for frame in frames)


def _chunk_metadata(shape: Sequence[int], chunks: Sequence[int]) -> dict[str, Any]:
    """zarr3 metadata of an array whose chunks all carry a CRC-32C."""
    return {
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1}},
            {"name": "crc32c"},
        ],
    }


class _Checksummed(tensorstore_utils.ArrayWriteSpec):
    """Adds checksums to Orbax's arrays, for which Orbax has no setting."""

    @property
    def json(self) -> dict[str, Any]:
        spec = super().json
        array = spec["base"] if spec["driver"] == "cast" else spec
        if array["driver"] == "zarr3":
            array["metadata"] = _chunk_metadata(self.metadata.shape, self.metadata.chunk_shape)
        return spec


tensorstore_utils.ArrayWriteSpec = _Checksummed


def _leading_axes(model: ModelConfig) -> dict[str, int]:
    """Leaf -> number of leading axes that are layers and experts."""
    axes = {"/".join(slot.path): len(slot.indices) for slot in slots(model).values()}
    for name in named_leaves(nn.unbox(abstract_params(model))):
        axes.setdefault(name, 1)  # LoRA experts: layers
    return axes


def _save_params(params: Params, metadata: CheckpointMetadata) -> ocp.args.PyTreeSave:
    """Save in chunks of one layer and expert, the unit that streaming reads."""
    axes = _leading_axes(metadata.model)

    def chunks(path: Any, _: Any) -> ocp.SaveArgs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return ocp.SaveArgs(shard_axes=tuple(range(axes.get(name, 0))))

    held = stored(params, metadata)
    return ocp.args.PyTreeSave(held, save_args=jax.tree_util.tree_map_with_path(chunks, held))


BestOf = Callable[[Iterable[int]], int | None]  # steps -> the best of them, if known


@dataclasses.dataclass(frozen=True)
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps, and the best."""

    newest: int
    best: BestOf

    def of(self, steps: Sequence[int]) -> set[int | None]:
        """The steps to keep. steps: oldest first."""
        return {*steps[-self.newest :], self.best(steps)}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self.of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own preemption checks: JAX's preemption service counts calls, and
    the run itself makes them (training/stopping.py)."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run. Saves run in the background; an interrupted save leaves no
    checkpoint. What killed processes of the same run left behind is removed.

    best: called at every save and on construction to choose the step that is kept in addition to
    the newest.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, best: BestOf = lambda steps: None):
        quiet()
        self._directory = (workdir / DIRECTORY).resolve()
        kept = _Kept(config.keep, best)
        if is_first():
            _sweep(self._directory, kept.of)
            _mark_finished(self._directory)
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for item in ("params", "opt_state"):
            registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_zarr3=True))
        for item in ("data", "about"):
            registry.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._manager = _Manager(
            str(self._directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept, enable_async_checkpointing=True, create=True
            ),
            handler_registry=registry,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that are kept, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        return self._directory / str(step)

    def save(
        self,
        metadata: CheckpointMetadata,
        params: Params,
        opt_state: Any = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Start saving metadata.step. The arrays may be donated afterwards: they are copied to the
        host first."""
        items = {
            "params": _save_params(params, metadata),
            "about": ocp.args.JsonSave(sealed(metadata_to_json(metadata))),
        }
        if opt_state is not None:
            held = {"data": data, "opt_state": sorted(named_leaves(opt_state))}
            items |= {
                "opt_state": ocp.args.PyTreeSave(opt_state),
                "data": ocp.args.JsonSave(sealed(held)),
            }
        self._told(lambda: self._manager.save(metadata.step, args=ocp.args.Composite(**items)))

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """(params, opt_state, data) of a step, with the shardings of the abstract arguments, on any
        mesh. params: those that are `stored`.

        Raises UserError when the step is damaged, or holds optimizer state for other leaves than
        opt_state.
        """
        path = self.path(step)
        read_metadata(path)
        data, _ = _read_data(path)
        held = _opt_state_leaves(path)
        if wrong := sorted(held ^ set(named_leaves(opt_state))):
            whose = (
                "the stored optimizer has state for parameters that this run does not train:"
                if wrong[0] in held
                else "this run trains parameters without stored optimizer state:"
            )
            raise UserError(f"{path}: {whose} {', '.join(wrong[:4])}; start in another --workdir")
        restored = _restore_item(path, "params", params)
        _check_finite(restored, path)
        return restored, _restore_item(path, "opt_state", opt_state), data

    def wait(self) -> None:
        self._told(self._manager.wait_until_finished)

    def _told(self, save: Callable[[], Any]) -> None:
        """Run `save`, reporting errors: a background save fails where the next one starts, or where
        it is awaited."""
        try:
            save()
        except Exception as error:  # Orbax passes on whatever its storage raises
            if is_first():
                _sweep(self._directory, keep=set)
            good = [str(step) for step in steps_of(self._directory)]
            rest = (
                f"step {good[-1]} there is intact" if good else "no step has been saved there yet"
            )
            raise UserError(f"cannot save to {self._directory}: {_short(error)}; {rest}") from error

    def close(self) -> None:
        self._told(self._manager.close)


def steps_of(directory: Path) -> list[int]:
    """The finished steps in a run's checkpoints/, oldest first."""
    steps = [path for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in steps if _is_finished(path))


def _is_finished(step: Path) -> bool:
    """Whether a step is finished. On disk, its name is proof enough; on a bucket, where nothing is
    renamed, Orbax's marker file or the metadata of a step copied from a disk is required."""
    if not is_on_bucket(step) or (step / FINISHED).exists():
        return True
    try:
        metadata = json.loads((step / "_CHECKPOINT_METADATA").read_bytes())
        return bool(metadata["commit_timestamp_nsecs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark_finished(directory: Path) -> None:
    """Mark steps that were copied to a bucket as finished, in the way Orbax expects there."""
    if is_on_bucket(directory) and directory.exists():
        for step in steps_of(directory):
            mark = directory / str(step) / FINISHED
            if not mark.exists():
                mark.write_text("Copied from a disk.", encoding="utf-8")


def _sweep(directory: Path, keep: Callable[[list[int]], set[Any]]) -> None:
    """Remove unfinished saves, and steps not in `keep`, whose deletion was interrupted. The caller
    holds the run's directory, so no living process owns them."""
    if not directory.is_dir():
        return
    steps = steps_of(directory)
    surplus = [str(step) for step in {*steps} - keep(steps)]
    for path in directory.iterdir():
        is_cut = path.name.isdigit() and not _is_finished(path)
        if path.name in surplus or is_cut or ".orbax-checkpoint-tmp" in path.name:
            remove(path)


def damaged(path: Path, what: str) -> UserError:
    """The error for a damaged step directory. what: the damaged part, and the symptom."""
    earlier = [step for step in steps_of(path.parent) if str(step) != path.name]
    earlier = [step for step in earlier if path.name.isdigit() and step < int(path.name)]
    cure = (
        f"delete it to resume from step {earlier[-1]}"
        if earlier
        else "there is no earlier step; delete it and run the stage again"
    )
    return UserError(f"{path} is damaged ({what}): {cure}")


def _read_json(path: Path, item: str) -> dict[str, Any]:
    """Read a JSON item of a step and verify and remove its seal; earlier versions wrote none."""
    values = _json(path, item)
    try:
        bare = SEAL not in values and _is_unsealed(path)
        return values if bare else unsealed(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(path, f"{item}/, {_short(error)}") from error


def _json(path: Path, item: str) -> Any:
    try:
        return json.loads((path / item / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"{item}/, {_short(error)}") from error


def _is_unsealed(path: Path) -> bool:
    metadata = _json(path, "about")
    return isinstance(metadata, dict) and metadata.get("format") == UNSEALED


def _read_data(path: Path) -> tuple[dict[str, Any], set[str] | None]:
    """(state of the data iterator, names of the optimizer's leaves); the latter is None in
    checkpoints of earlier versions."""
    values = _read_json(path, "data")
    return (values["data"], set(values["opt_state"])) if "opt_state" in values else (values, None)


def _opt_state_leaves(path: Path) -> set[str]:
    """Names of the optimizer's stored leaves. Raises UserError unless they are those that were
    saved."""
    _, known = _read_data(path)
    held = set(named_leaves(_item_metadata(path, "opt_state")))
    if known is not None and (wrong := sorted(held ^ known)):
        which = "unknown" if wrong[0] in held else "missing"
        raise damaged(path, f"opt_state/, {which} {wrong[0]}")
    return held


def read_metadata(path: Path) -> CheckpointMetadata:
    """Metadata of a step directory."""
    values = _read_json(path, "about")
    try:
        return metadata_from_json(values, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"about/, {type(error).__name__}: {error}") from error


def _item_metadata(path: Path, item: str) -> Any:
    """Metadata of an item. Opens the store itself first: Orbax would report a damaged store, or a
    relative path, as empty."""
    place = (path / item).resolve()
    try:
        json.loads((place / "_METADATA").read_text(encoding="utf-8"))
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": _url(place)}).result()
        if not store.list().result():
            raise FileNotFoundError("its manifest is missing or lists no array")
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.metadata(str(place)).item_metadata
    except Exception as error:  # Orbax passes on whatever its storage raises
        raise _unreadable(path, item, error) from error


def _restore_item(path: Path, item: str, abstract: Any) -> Any:
    try:
        told = plain(f"reading {path / item}")
        with clock(told, is_first()), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(str((path / item).resolve()), abstract)
    except Exception as error:  # Orbax passes on whatever its storage raises
        raise _unreadable(path, item, error) from error


def restore_params(path: Path, metadata: CheckpointMetadata, abstract: Any) -> Params:
    """Restore the parameters that a step holds (`stored`), with the shardings and dtypes of
    `abstract`.

    Raises UserError that lists every leaf that is unknown, missing or misshapen for the model, or
    holds NaN or infinity.
    """
    _check_stored(path, metadata)
    params = _restore_item(path, "params", stored(abstract, metadata))
    _check_finite(params, path)
    return params


def _check_finite(params: Params, path: Path) -> None:
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params)
    raise_problems(
        path,
        [f"NaN or infinity in {name}" for name, good in named_leaves(finite).items() if not good],
    )


def _unreadable(path: Path, item: str, error: Exception) -> UserError:
    """A one-line error for what storage raised while reading an item. Errors that are not the fault
    of the stored bytes are not reported as damage."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        raise error
    cause: BaseException = error
    while cause.__cause__ is not None:  # Orbax's own message says where in its code, not why
        cause = cause.__cause__
    told = " ".join(str(cause).split())
    if reason := _system_reason(told):
        return UserError(f"{path}: {item}/ cannot be read: {reason}")
    leaf = re.search(r'Error reading "([\w.]+)/(?:c/|zarr|\.zarray|\d)', told)
    at = f"{item}/{leaf[1].replace('.', '/')}" if leaf else f"{item}/"
    sums = re.search(r"(?i)digest mismatch|checksum verification", told)
    return damaged(path, f"{at}, {'checksum' if sums else told[:200]}")


def _system_reason(told: str) -> str:
    """The operating system's message within TensorStore's, or ""."""
    found = re.search(r": ([^:]+) \[os_error_code='(\d+)'", told)
    return found[1] if found and int(found[2]) != errno.ENOENT else ""


def _short(error: Exception) -> str:
    """One line of an error, without the specification that TensorStore appends."""
    told = " ".join(str(error).split())
    return _system_reason(told) or told[:300]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by name: layers_0/ffn/gate -> leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_stored(path: Path, metadata: CheckpointMetadata) -> None:
    expected = stored(nn.unbox(abstract_params(metadata.model)), metadata)
    want, have = (
        {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
        for tree in (expected, _item_metadata(path, "params"))
    )
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unknown {name}" for name in have if name not in want]
    problems += [
        f"{name} is {have[name]}, not {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if problems:
        raise damaged(path, "params/, not its model's: " + "; ".join(problems))


def _url(directory: Path) -> str:
    """A directory's URL for TensorStore."""
    return f"{directory}/" if is_on_bucket(directory) else f"file://{directory.resolve()}/"


def _array_spec(item: Path, name: str) -> dict[str, Any]:
    """TensorStore spec of a leaf: Orbax stores each as a zarr array in one OCDBT key-value store,
    version 3, or 2 in earlier versions. Missing data is an error, never zeros."""
    zarr3 = json.loads((item / "_METADATA").read_text(encoding="utf-8"))["use_zarr3"]
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": _url(item),
            "path": name.replace("/", ".") + "/",
        },
        "fill_missing_data_reads": False,
    }


class StepReader:
    """Reads a step's parameters one tensor at a time. slots: of the tensors that the step holds.

    by_leaf: whether its chunks span layers or experts, as earlier versions wrote them. A whole leaf
    is then held in memory, and read once if its tensors are requested consecutively.
    """

    def __init__(self, path: Path):
        self._path = path
        metadata = read_metadata(path)
        self.model = metadata.model
        _check_stored(path, metadata)
        held = slots(self.model).items()
        self.slots = {tensor: slot for tensor, slot in held if metadata.holds(slot.path)}
        axes = {slot.path: len(slot.indices) for slot in self.slots.values()}
        self._stores = {leaf: _open(path, "params", "/".join(leaf)) for leaf in axes}
        self.dtypes = {
            tensor: self._stores[slot.path].dtype.numpy_dtype for tensor, slot in self.slots.items()
        }
        self._whole = {
            leaf
            for leaf, store in self._stores.items()
            if any(n > 1 for n in store.chunk_layout.read_chunk.shape[: axes[leaf]])
        }
        self.by_leaf = bool(self._whole)
        self._held: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._bad_values: list[TensorId] = []

    def read(self, tensor: TensorId) -> np.ndarray:
        slot = self.slots[tensor]
        if slot.path in self._whole:
            part = self._leaf(slot.path)[slot.indices]
        else:
            part = _read(self._path, "params", self._stores[slot.path][slot.indices])
        array = slot.to_theirs(part)
        if not is_finite(array):
            self._bad_values.append(tensor)
        array = array if array.base is not part else array.copy()
        array.flags.writeable = False
        return array

    def read_region(self, tensor: TensorId, region: Region) -> np.ndarray:
        slot = self.slots[tensor]
        index: Any = (*slot.indices, *(slice(*along) for along in region))
        if slot.path in self._whole:
            part = self._leaf(slot.path)[index]
        else:
            part = _read(self._path, "params", self._stores[slot.path][index])
        if not is_finite(np.ascontiguousarray(part)):
            self._bad_values.append(tensor)
        return part

    def _leaf(self, leaf: tuple[str, ...]) -> np.ndarray:
        with self._lock:
            if leaf not in self._held:
                self._held[leaf] = _read(self._path, "params", self._stores[leaf])
            self._held.move_to_end(leaf)
            while len(self._held) > _LEAVES_HELD:
                self._held.popitem(last=False)
            return self._held[leaf]

    def check(self) -> None:
        """Raise UserError when a tensor that was read held NaN or infinity."""
        raise_problems(
            self._path,
            [f"NaN or infinity in {tensor}" for tensor in dict.fromkeys(self._bad_values)],
        )


def _open(path: Path, item: str, name: str) -> Any:
    try:
        return tensorstore.open(_array_spec(path / item, name), read=True).result()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, item, error) from error


def _read(path: Path, item: str, store: Any) -> np.ndarray:
    try:
        return np.asarray(store.read().result())
    except ValueError as error:  # TensorStore raises it for everything
        raise _unreadable(path, item, error) from error


def items_of(path: Path) -> list[str]:
    """Items that a step should hold. Those needed to resume are either all present or, in mixed or
    converted checkpoints, all absent."""
    resumable = any((path / item).is_dir() for item in RESUMED)
    return [*DESCRIBED, *(RESUMED if resumable else ())]


def verify_item(path: Path, item: str) -> str:
    """Read all of one item of a step; returns what was checked. Raises UserError when it is
    damaged."""
    if item in ("about", "data"):
        _read_json(path, item)
        return "checksum" if SEAL in _json(path, item) else "no checksum"
    names, nbytes, problems = list(named_leaves(_item_metadata(path, item))), 0, []
    for name in bar(names, desc=f"{path.name}/{item}", unit="array", leave=False):
        store = _open(path, item, name)
        nbytes += store.size * store.dtype.numpy_dtype.itemsize
        for part in _parts(store):
            values = _read(path, item, part)
            if values.dtype.kind not in "iub" and not is_finite(values):
                problems.append(f"NaN or infinity in {name}")
    raise_problems(path / item, list(dict.fromkeys(problems)))
    if item == "params":
        _check_stored(path, read_metadata(path))
    else:
        _opt_state_leaves(path)
    zarr3 = _array_spec(path / item, "")["driver"] == "zarr3"
    how = "checksums" if zarr3 else "no checksums; structure"
    return f"{how}, finite values: {len(names)} arrays, {nbytes / 2**20:,.1f} MiB"


def _parts(store: Any) -> Iterator[Any]:
    """Split along the first axis by chunks, to limit memory."""
    if not store.rank:
        yield store
        return
    step = store.chunk_layout.read_chunk.shape[0]
    for start in range(0, store.shape[0], step):
        yield store[start : min(start + step, store.shape[0])]


class StepWriter:
    """Writes WORKDIR/checkpoints/0 one tensor at a time, in Orbax's format: one zarr chunk per
    layer and expert.

    Raises UserError when tensors of one leaf differ in dtype.
    """

    def __init__(self, workdir: Path, model: ModelConfig, dtypes: Mapping[TensorId, np.dtype]):
        self.model = model
        self._path = workdir / DIRECTORY / "0"
        self._slots = slots(model)
        self._stores: dict[tuple[str, ...], Any] = {}
        self._shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
        for name, leaf in named_leaves(nn.unbox(abstract_params(model))).items():
            self._shapes[tuple(name.split("/"))] = leaf.shape
        by_leaf: dict[tuple[str, ...], dict[str, TensorId]] = {}
        for tensor, slot in self._slots.items():
            by_leaf.setdefault(slot.path, {}).setdefault(dtypes[tensor].name, tensor)
        for kinds in by_leaf.values():
            if len(kinds) > 1:
                raise UserError(
                    f"{' but '.join(f'{name} is {dtype}' for dtype, name in kinds.items())}; choose"
                    " one dtype for all"
                )
        self._dtypes = {slot.path: dtypes[tensor] for tensor, slot in self._slots.items()}
        self._write_metadata()

    def _store(self, slot: Slot) -> Any:
        if slot.path not in self._stores:
            spec = _array_spec(self._path / "params", "/".join(slot.path))
            spec["metadata"] = _chunk_metadata(
                self._shapes[slot.path], [1] * len(slot.indices) + list(slot.part)
            )
            spec["store_data_equal_to_fill_value"] = True  # store zeros explicitly
            dtype = self._dtypes[slot.path].name
            self._stores[slot.path] = tensorstore.open(
                spec, create=True, read=True, write=True, dtype=dtype
            ).result()
        return self._stores[slot.path]

    def write(self, tensor: TensorId, array: np.ndarray) -> None:
        slot = self._slots[tensor]
        try:
            self._store(slot)[slot.indices].write(slot.to_ours(array)).result()
        except ValueError as error:  # TensorStore raises it for everything, even disk errors
            reason = re.search(r": ([^:]+) \[os_error_code='(\d+)'", str(error))
            raise OSError(
                int(reason[2]) if reason else 0, reason[1] if reason else str(error)
            ) from error

    def _write_metadata(self) -> None:
        """Write Orbax's metadata of the tree."""
        tree = {}
        for leaf, shape in self._shapes.items():
            keys = [{"key": key, "key_type": 2} for key in leaf]
            values = {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            }
            tree[str(leaf)] = {"key_metadata": keys, "value_metadata": values}
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._path / "params").mkdir(parents=True)
        (self._path / "params" / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")

    def finish(self, metadata: CheckpointMetadata) -> None:
        """Write the checkpoint's description of itself."""
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(self._path / "about", sealed(metadata_to_json(metadata)))
        for directory in (self._path / "params", self._path):  # Orbax requires both on buckets
            (directory / FINISHED).write_text("Written whole.", encoding="utf-8")
