"""Checkpoints of a run, through Orbax: the only module that knows it.

A run keeps them in WORKDIR/checkpoints/STEP/{params, opt_state, data, about}: separate items, so that a mix reads parameters
only. `about` makes params self-describing: the model, what it was trained on so far. The tokenizer lies in WORKDIR/tokenizer.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from btx_jax.config import CheckpointConfig, ModelConfig, from_dict, to_dict
from btx_jax.errors import UserError
from btx_jax.models.llama import Params, abstract_params

DIRECTORY = "checkpoints"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class About:
    """history: run id -> {tokens, flops}, every training run behind these parameters, each once. step: of the last of them."""

    model: ModelConfig
    step: int
    history: dict[str, dict[str, float]]

    def total(self, what: str) -> float:
        return sum(run[what] for run in self.history.values())


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One step's directory, found and described but not read."""

    path: Path
    about: About

    @functools.cached_property
    def tokenizer(self) -> Path:
        return self.path.parent.parent / "tokenizer"


def _about_to_json(about: About) -> dict[str, Any]:
    return {"format": FORMAT, "model": to_dict(about.model), "step": about.step, "history": about.history}


def _about_from_json(values: dict[str, Any], path: Path) -> About:
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {values.get('format')!r}; this version reads {FORMAT}")
    return About(from_dict(ModelConfig, values["model"], f"{path}: model"), values["step"], values["history"])


def _quiet() -> None:
    """Orbax reports every save at INFO through absl; a run's own log says what users need."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)


class Checkpoints:
    """The checkpoints of one run. Saves in the background; a save that was interrupted does not exist."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        _quiet()
        self._manager = ocp.CheckpointManager(
            (workdir / DIRECTORY).resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True, create=True),
            item_names=("params", "opt_state", "data", "about"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, about: About, params: Params, opt_state: Any = None, data: dict[str, Any] | None = None) -> None:
        """Start saving about.step. Arrays may be donated afterwards: they are copied to the host first."""
        items = {"params": ocp.args.StandardSave(params), "about": ocp.args.JsonSave(_about_to_json(about))}
        if opt_state is not None:
            items |= {"opt_state": ocp.args.StandardSave(opt_state), "data": ocp.args.JsonSave(data)}
        self._manager.save(about.step, args=ocp.args.Composite(**items))

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Params, Any, dict[str, Any]]:
        """(params, opt_state, data) of a step, onto the shardings of the abstract arguments: any mesh will do."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), opt_state=ocp.args.StandardRestore(opt_state), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["params"], restored["opt_state"], restored["data"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def find_checkpoint(path: str | Path, key: str = "checkpoint") -> Checkpoint:
    """A run's working directory (its last step), or one step's directory. Raises UserError when it is neither."""
    _quiet()
    path = Path(path).resolve()
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
    if (path / DIRECTORY).is_dir():
        steps = [int(p.name) for p in (path / DIRECTORY).iterdir() if p.name.isdigit()]
        if not steps:
            raise UserError(f"{key}: {path} holds no finished checkpoint yet")
        path = path / DIRECTORY / str(max(steps))
    if not (path / "params").is_dir() or not (path / "about").is_dir():
        raise UserError(f"{key}: {path} is no checkpoint; name a run's --workdir or WORKDIR/{DIRECTORY}/STEP")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        values = checkpointer.restore(path / "about")
    return Checkpoint(path, _about_from_json(values, path))


def load_params(checkpoint: Checkpoint, abstract: Any = None) -> Params:
    """The parameters, onto the shardings of `abstract`, or all on the first local device.

    Raises UserError listing every leaf that is unknown, missing or misshapen against the checkpoint's own model.
    """
    expected = nn.unbox(abstract_params(checkpoint.about.model))
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(checkpoint.path / "params").item_metadata
        _check_leaves(expected, stored, checkpoint.path)
        if abstract is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), expected)
        return checkpointer.restore(checkpoint.path / "params", abstract)


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _check_leaves(expected: Any, stored: Any, path: Path) -> None:
    want, have = _named_shapes(expected), _named_shapes(stored)
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unknown {name}" for name in have if name not in want]
    problems += [f"{name} is {have[name]}, not {want[name]}" for name in want if name in have and have[name] != want[name]]
    if problems:
        raise UserError(f"{path} does not hold its model: " + "; ".join(problems))


def digest(params: Params) -> str:
    """sha256 over all parameters in the order of their paths: path, dtype, shape and bytes (little-endian, C order) of each."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    total = hashlib.sha256()
    for name in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[name]))
        total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
