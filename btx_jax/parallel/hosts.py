"""Runs that span several processes: how they connect, and how they agree on values."""

import functools
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from numpy.typing import ArrayLike

from btx_jax.errors import UserError
from btx_jax.parallel.accelerators import has_tpu_device

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Join the other processes of this run, if there are any. Must run before anything touches a
    device.

    The cluster is given by the arguments or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Otherwise JAX detects it where several hosts are likely: SLURM steps with
    several tasks, GKE, and any machine with a TPU except Colab's. Raises UserError when the cluster
    is only partly specified.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    told = {
        "JAX_NUM_PROCESSES": str(num_processes or os.environ.get("JAX_NUM_PROCESSES", "")),
        "JAX_PROCESS_ID": str(
            process_id if process_id >= 0 else os.environ.get("JAX_PROCESS_ID", "")
        ),
    }
    if coordinator and any(told.values()):
        for name, value in told.items():
            if not value.isdigit():
                raise UserError(
                    f"{name}={value!r}: must be a number when a coordinator is named; set both"
                    f" {' and '.join(told)}"
                )
        jax.distributed.initialize(
            coordinator, int(told["JAX_NUM_PROCESSES"]), int(told["JAX_PROCESS_ID"])
        )
    elif coordinator or _expects_others():
        jax.distributed.initialize(coordinator or None)
    elif _has_tpu():
        try:
            jax.distributed.initialize()
        except (
            ValueError,
            RuntimeError,
        ) as error:  # a device that only looks like a TPU, or a TPU without a cluster
            log.info("this process runs alone: %s", str(error).splitlines()[0])


def _has_tpu() -> bool:
    return has_tpu_device() and "COLAB_RELEASE_TAG" not in os.environ


def _expects_others() -> bool:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return tasks != "1" or slices != "1" or len(workers) > 1


def is_first() -> bool:
    """Whether this is the process that writes logs and small files."""
    return jax.process_index() == 0


def first_then_others(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call function(...) in the first process, then in the others, which can read what it wrote. An
    error in the first process ends all of them."""
    if jax.process_count() == 1:
        return function(*args, **kwargs)
    if not is_first():
        if not _agreed(False):
            raise UserError(
                f"process {jax.process_index()} stops because process 0 failed; see its log"
            )
        return function(*args, **kwargs)
    try:
        result = function(*args, **kwargs)
    except BaseException:
        _agreed(False)
        raise
    _agreed(True)
    return result


def by_all(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call function(...) in every process; it must not communicate. A UserError in any process is
    raised in all of them."""
    if jax.process_count() == 1:
        return function(*args, **kwargs)
    try:
        result = function(*args, **kwargs)
    except UserError as error:
        told = _all_told(str(error))
    except BaseException:
        _all_told(f"process {jax.process_index()} failed; see its log")
        raise
    else:
        told = _all_told("")
        if not told:
            return result
    raise UserError("; ".join(told))


def _all_told(text: str) -> list[str]:
    """The distinct non-empty texts that the processes pass; every process must call this."""
    said = np.zeros(4096, np.uint8)
    data = np.frombuffer(text.encode("utf-8", "replace")[: len(said)], np.uint8)
    said[: len(data)] = data
    rows = multihost_utils.process_allgather(said).reshape(-1, len(said))
    texts = [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in rows]
    return list(dict.fromkeys(filter(None, texts)))


def _agreed(value: bool) -> bool:
    """The first process's value, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def text_of_first(text: str) -> str:
    """The first process's text, in every process."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data))))
    held = np.resize(data, size) if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(held), np.uint8)).decode()


def require_shared(directory: Path, key: str) -> None:
    """Raise UserError, in every process, unless all processes see the same files in `directory`,
    which is created if missing."""
    if jax.process_count() == 1:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot write to {directory}: {error.strerror}") from error
    nonce = multihost_utils.broadcast_one_to_all(np.asarray(secrets.randbits(31)))
    mark = directory / f".shared-{int(nonce)}"
    if is_first():
        mark.touch()
    multihost_utils.sync_global_devices(f"marked {key}")
    sees = multihost_utils.process_allgather(np.asarray(mark.exists())).reshape(-1)
    if is_first():
        mark.unlink(missing_ok=True)
    if not sees.all():
        blind = ", ".join(str(i) for i in np.flatnonzero(~sees))
        raise UserError(
            f"{key}: {directory} is not shared: process {blind} does not see what process 0"
            " writes; name a path that all processes share"
        )


@functools.cache
def _largest() -> tuple[Any, Sharding]:
    """(jitted maximum over an array with one number per device, sharding of its input)."""
    devices = Mesh(np.asarray(jax.devices()), ("all",))
    whole, spread = (NamedSharding(devices, PartitionSpec(*axes)) for axes in ((), ("all",)))
    return jax.jit(jnp.max, out_shardings=whole), spread


def any_of_all(value: bool) -> ArrayLike:
    """Whether `value` is true in any process, [] bool; every process must call this. Returns
    without waiting: reading the result blocks until the devices have finished the work dispatched
    before it."""
    if jax.process_count() == 1:
        return value
    largest, spread = _largest()
    own = np.full(jax.local_device_count(), value)
    return largest(jax.make_array_from_process_local_data(spread, own))


def share_of_rows(sharding: Sharding) -> tuple[int, int]:
    """Return (i, n): processes divide a batch's rows into n parts, and this process's devices hold
    part i. (0, 1), all rows in every process, if the parts of two processes overlap without being
    equal."""
    held: dict[int, set[int]] = {}
    places: dict[Any, Any] = dict(sharding.devices_indices_map((sharding.num_devices,)))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({frozenset(rows) for rows in held.values()}, key=min)
    if sum(map(len, parts)) > len(frozenset.union(*parts)):
        return 0, 1
    return parts.index(frozenset(held[jax.process_index()])), len(parts)


def put(array: ArrayLike, sharding: Sharding) -> jax.Array:
    """Put a host array that every process holds in full onto this process's devices, sharded."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def whole(array: jax.Array) -> np.ndarray:
    """The full array, in every process; every process must call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def of_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, in every process. All processes must pass an array of the same
    shape."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))
