"""Checkpoints of a run, through Orbax: the only module that knows it.

A run keeps them in WORKDIR/checkpoints/STEP/{params, opt_state, data, about}: separate items, so
that a mix reads parameters only. `about` makes params self-describing: the model, what it was
trained on so far. The tokenizer lies in WORKDIR/tokenizer.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import linen as nn

from btx_jax.checkpoints.huggingface import Slot, is_finite, raise_problems, slots
from btx_jax.config import CheckpointConfig
from btx_jax.config_dict import from_dict, to_dict
from btx_jax.errors import UserError
from btx_jax.model_config import ModelConfig
from btx_jax.models.llama import Params, abstract_params
from btx_jax.models.lora import is_adapter, partition

DIRECTORY = "checkpoints"
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What one training run took. seconds: in its steps, over all its starts; compiling, saving and
    evaluating left out. peak_bytes: of one step, per chip, as compiled. after: ids of all runs
    behind the parameters it started from."""

    tokens: int
    flops: float
    seconds: float
    chips: int
    peak_bytes: int
    after: tuple[str, ...] = ()


History = Mapping[str, TrainingRun]


@dataclasses.dataclass(frozen=True)
class Base:
    """The model under LoRA experts: where it was found, and sha256 over its values
    (`checkpoint.load_base`)."""

    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class About:
    """history: run id -> every training run behind these parameters, each once. step: of the last
    of them. base: of LoRA experts; then the checkpoint holds these alone. huggingface: what
    config.json and generation_config.json of the model that this came from say beyond ModelConfig,
    as {"config": {...}, "generation_config": {...}}; {} for a model that was born here."""

    model: ModelConfig
    step: int
    history: History
    base: Base | None = None
    huggingface: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def costs(self, without: History | None = None) -> dict[str, float]:
        """Of all runs but `without`. critical_seconds: of the longest chain of runs that had to
        wait for each other, so with branches side by side; chip_seconds: of all together."""
        runs = {name: run for name, run in self.history.items() if name not in (without or {})}

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
        }


def about_to_json(about: About) -> dict[str, Any]:
    base = {"base": to_dict(about.base)} if about.base else {}
    huggingface = {"huggingface": dict(about.huggingface)} if about.huggingface else {}
    return (
        {
            "format": FORMAT,
            "model": to_dict(about.model),
            "step": about.step,
            "history": to_dict(about.history),
        }
        | base
        | huggingface
    )


def about_from_json(values: dict[str, Any], path: Path) -> About:
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {values.get('format')!r}; this version reads {FORMAT}"
        )
    history = {
        name: from_dict(TrainingRun, run, f"{path}: history")
        for name, run in values["history"].items()
    }
    base = from_dict(Base, values["base"], f"{path}: base") if "base" in values else None
    return About(
        from_dict(ModelConfig, values["model"], f"{path}: model"),
        values["step"],
        history,
        base,
        values.get("huggingface", {}),
    )


def stored(params: Any, model: ModelConfig) -> Any:
    """What a checkpoint holds of these parameters: all, or the LoRA experts alone."""
    return partition(params, is_adapter)[0] if model.lora else params


def quiet() -> None:
    """Orbax reports every save at INFO through absl; a run's own log says what users need."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)


class Checkpoints:
    """The checkpoints of one run. Saves in the background; a save that was interrupted does not
    exist."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        quiet()
        self._directory = (workdir / DIRECTORY).resolve()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, enable_async_checkpointing=True, create=True
            ),
            item_names=("params", "opt_state", "data", "about"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return self._directory / str(step)

    def save(
        self,
        about: About,
        params: Params,
        opt_state: Any = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Start saving about.step. Arrays may be donated afterwards: they are copied to the host
        first."""
        items = {
            "params": ocp.args.StandardSave(stored(params, about.model)),
            "about": ocp.args.JsonSave(about_to_json(about)),
        }
        if opt_state is not None:
            items |= {
                "opt_state": ocp.args.StandardSave(opt_state),
                "data": ocp.args.JsonSave(data),
            }
        self._told(lambda: self._manager.save(about.step, args=ocp.args.Composite(**items)))

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """(params, opt_state, data) of a step, onto the shardings of the abstract arguments: any
        mesh will do. params: what is `stored`.

        Raises UserError when it holds moments of other leaves than opt_state."""
        names = lambda tree: set(named_leaves(tree))  # noqa: E731
        with ocp.StandardCheckpointer() as checkpointer:
            held = checkpointer.metadata(self.path(step) / "opt_state").item_metadata
        if wrong := sorted(names(held) ^ names(opt_state)):
            whose = (
                "the stored optimizer holds, and this run does not train,"
                if wrong[0] in names(held)
                else "this run trains, unstored,"
            )
            raise UserError(
                f"{self.path(step)}: {whose} {', '.join(wrong[:4])}; start in another --workdir"
            )
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            data=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax passes on whatever its storage raises
            cure = f"delete {self.path(step)} to go on from the step before"
            raise UserError(f"{self.path(step)} is damaged: {_short(error)}; {cure}") from error
        _check_finite(restored["params"], self.path(step))
        return restored["params"], restored["opt_state"], restored["data"]

    def wait(self) -> None:
        self._told(self._manager.wait_until_finished)

    def _told(self, save: Callable[[], Any]) -> None:
        """A save that runs in the background fails where the next one starts, or where it is waited
        for."""
        try:
            save()
        except Exception as error:  # Orbax passes on whatever its storage raises
            raise UserError(
                f"cannot save to {self._directory}: {_short(error)}; earlier steps there are good"
            ) from error

    def close(self) -> None:
        self._told(self._manager.close)


def read_about(path: Path) -> About:
    """Of a step's directory."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return about_from_json(checkpointer.restore(path / "about"), path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: about/ is damaged: {type(error).__name__}: {error}") from error


def restore_params(path: Path, model: ModelConfig, abstract: Any) -> Params:
    """What a step holds of the parameters (`stored`), onto the shardings and into the dtypes of
    `abstract`.

    Raises UserError listing every leaf that is unknown, missing or misshapen against the model, or
    holds NaN or infinity.
    """
    _check_stored(path, model)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", stored(abstract, model))
    except Exception as error:  # Orbax passes on whatever its storage raises
        raise UserError(f"{path}: params/ is damaged: {_short(error)}") from error
    _check_finite(params, path)
    return params


def _check_finite(params: Params, path: Path) -> None:
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params)
    raise_problems(
        path,
        [f"NaN or infinity in {name}" for name, good in named_leaves(finite).items() if not good],
    )


def _short(error: Exception) -> str:
    """TensorStore appends its whole specification."""
    return " ".join(str(error).split())[:300]


def named_leaves(tree: Any) -> dict[str, Any]:
    """layers_0/ffn/gate -> leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_stored(path: Path, model: ModelConfig) -> None:
    """Opens the store itself first: Orbax would report a damaged one as empty."""
    params = path / "params"
    try:
        json.loads((params / "_METADATA").read_text(encoding="utf-8"))
        tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": f"file://{params.resolve()}/"}
        ).result().list().result()
        with ocp.StandardCheckpointer() as checkpointer:
            held = checkpointer.metadata(params).item_metadata
        _check_leaves(stored(nn.unbox(abstract_params(model)), model), held, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: params/ is damaged: {type(error).__name__}: {error}") from error


def _check_leaves(expected: Any, stored: Any, path: Path) -> None:
    want, have = (
        {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
        for tree in (expected, stored)
    )
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unknown {name}" for name in have if name not in want]
    problems += [
        f"{name} is {have[name]}, not {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if problems:
        raise UserError(f"{path} does not hold its model: " + "; ".join(problems))


def _store_spec(params: Path, leaf: tuple[str, ...]) -> dict[str, Any]:
    """Orbax keeps every leaf as a zarr array in one OCDBT key-value store."""
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{params.resolve()}/",
            "path": ".".join(leaf) + "/",
        },
    }


class StepReader:
    """Reads a step's parameters one tensor at a time, under their Hugging Face names and in Hugging
    Face's layout."""

    def __init__(self, path: Path):
        self._path = path
        self.model = read_about(path).model
        _check_stored(path, self.model)
        self.slots = slots(self.model)
        leaves = {slot.path for slot in self.slots.values()}
        self._stores = {
            leaf: tensorstore.open(_store_spec(path / "params", leaf), read=True).result()
            for leaf in leaves
        }
        self.dtypes = {
            name: self._stores[slot.path].dtype.numpy_dtype for name, slot in self.slots.items()
        }
        self._bad_values: list[str] = []

    def read(self, name: str) -> np.ndarray:
        slot = self.slots[name]
        try:
            array = slot.to_theirs(
                np.asarray(self._stores[slot.path][slot.indices].read().result())
            )
        except ValueError as error:  # tensorstore's for everything
            raise UserError(
                f"{self._path}: {'/'.join(slot.path)} cannot be read: {error}"
            ) from error
        if not is_finite(array):
            self._bad_values.append(name)
        array.flags.writeable = False
        return array

    def check(self) -> None:
        """Raises UserError when a tensor that was read held NaN or infinity."""
        raise_problems(
            self._path, [f"NaN or infinity in {name}" for name in dict.fromkeys(self._bad_values)]
        )


class StepWriter:
    """Writes WORKDIR/checkpoints/0 one tensor at a time, as Orbax would: one zarr chunk per layer
    and expert.

    dtypes: name -> numpy dtype. Raises UserError when tensors of one leaf differ in dtype.
    """

    def __init__(self, workdir: Path, model: ModelConfig, dtypes: Mapping[str, np.dtype]):
        self.model = model
        self._path = workdir / DIRECTORY / "0"
        self._slots = slots(model)
        self._stores: dict[tuple[str, ...], Any] = {}
        self._shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
        for name, leaf in named_leaves(nn.unbox(abstract_params(model))).items():
            self._shapes[tuple(name.split("/"))] = leaf.shape
        by_leaf: dict[tuple[str, ...], dict[str, str]] = {}
        for name, slot in self._slots.items():
            by_leaf.setdefault(slot.path, {}).setdefault(dtypes[name].name, name)
        for kinds in by_leaf.values():
            if len(kinds) > 1:
                raise UserError(
                    f"{' but '.join(f'{name} is {dtype}' for dtype, name in kinds.items())}; choose"
                    " one dtype for all"
                )
        self._dtypes = {slot.path: dtypes[name] for name, slot in self._slots.items()}

    def _store(self, slot: Slot) -> Any:
        if slot.path not in self._stores:
            spec = _store_spec(self._path / "params", slot.path)
            shape = self._shapes[slot.path]
            spec["metadata"] = {
                "chunks": [1] * len(slot.indices) + list(slot.part),
                "compressor": {"id": "zstd", "level": 1},
            }
            dtype = self._dtypes[slot.path].name
            self._stores[slot.path] = tensorstore.open(
                spec, create=True, read=True, write=True, dtype=dtype, shape=shape
            ).result()
        return self._stores[slot.path]

    def write(self, name: str, tensor: np.ndarray) -> None:
        slot = self._slots[name]
        try:
            self._store(slot)[slot.indices].write(slot.to_ours(tensor)).result()
        except ValueError as error:  # tensorstore's for everything, the disk included
            reason = re.search(r": ([^:]+) \[os_error_code='(\d+)'", str(error))
            raise OSError(
                int(reason[2]) if reason else 0, reason[1] if reason else str(error)
            ) from error

    def finish(self, about: About) -> None:
        """Orbax's own metadata of the tree, and what the checkpoint says about itself."""
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
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._path / "params" / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(self._path / "about", about_to_json(about))
