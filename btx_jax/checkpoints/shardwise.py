"""Assemble a reader's tensors into parameters sharded over devices: each process reads only the
parts that its own devices hold."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from btx_jax.architectures.tensors import Range, Reader, Region, Slot, TensorId
from btx_jax.checkpoints.base import tensor_digest
from btx_jax.models.llama import Params
from btx_jax.parallel.hosts import by_all, is_first
from btx_jax.progress import bar

_ALIGNMENT = 64  # bytes; XLA uses such arrays on the CPU without a copy


def assemble(
    reader: Reader,
    abstract: Any,
    slots: Mapping[TensorId, Slot],
    hashes: dict[TensorId, str] | None = None,
) -> Params:
    """Build a parameter tree from a reader's tensors, with the shardings and dtypes of `abstract`.

    Each process reads only the layers, experts, rows and columns that its devices hold; replicated
    ones are read once. Host memory holds the process's share of one leaf, and the part of one
    tensor being read.

    hashes: receives the sha256 of each tensor's float32 values; processes that share the mesh
    divide the tensors among them and read those whole. Raises UserError, in every process, when a
    value that any of them read is NaN or infinite, or its data is damaged. Tensors read whole are
    compared with their checksums, if any; parts cannot be.
    """
    leaves = jax.tree.leaves(abstract)
    devices = {device for leaf in leaves for device in leaf.sharding.device_set}
    several = len({device.process_index for device in devices}) > 1
    rank, count = (jax.process_index(), jax.process_count()) if several else (0, 1)
    mine = set(list(slots)[rank::count]) if hashes is not None else set()
    own: dict[TensorId, str] = {}

    def read_all() -> Params:
        held: dict[tuple[str, ...], list[TensorId]] = {}
        progress = bar(
            total=len(slots), desc="reading", unit="tensor", leave=False, shown=is_first()
        )
        for tensor, slot in slots.items():
            held.setdefault(slot.path, []).append(tensor)

        def leaf(path, target):
            index_of = target.sharding.addressable_devices_indices_map(target.shape)
            regions = {_region(index, target.shape) for index in index_of.values()}
            parts = {
                region: _empty([stop - start for start, stop in region], target.dtype)
                for region in regions
            }
            for tensor in held[tuple(str(key.key) for key in path)]:
                whole = None
                if tensor in mine:
                    whole = reader.read(tensor)
                    own[tensor] = tensor_digest(whole)
                _fill(parts, reader, tensor, slots[tensor], whole)
                progress.update()
            return jax.make_array_from_callback(
                target.shape,
                target.sharding,
                lambda index: parts[_region(index, target.shape)],
                target.dtype,
            )

        with progress:
            params = jax.tree_util.tree_map_with_path(leaf, abstract)
        reader.check()
        return params

    params = by_all(read_all) if several else read_all()
    if hashes is not None:
        hashes.update(_exchanged(own, list(slots)) if several else own)
    return params


def _fill(
    parts: Mapping[Region, np.ndarray],
    reader: Reader,
    tensor: TensorId,
    slot: Slot,
    whole: np.ndarray | None,
) -> None:
    """Copy the contribution of one tensor to regions of a leaf. whole: the tensor, if already
    read."""
    depth = len(slot.indices)
    at = tuple((i, i + 1) for i in slot.indices)
    views = [
        (region[depth:], array[_within(at, region[:depth])].reshape(array.shape[depth:]))
        for region, array in parts.items()
        if _holds(region[:depth], at)
    ]
    for block in _blocks([region for region, _ in views], len(slot.part)):
        if whole is None and block == tuple((0, size) for size in slot.part):
            whole = reader.read(tensor)
        if whole is None:
            values = reader.read_region(tensor, block)
        else:
            values = slot.to_ours(whole)[_within(block)]
        for region, view in views:
            if _holds(block, region):
                view[...] = values[_within(region, block)]


def _blocks(regions: list[Region], axes: int) -> set[Region]:
    """The regions to read: those that adjoin or overlap are joined."""
    merged = [_merged(region[axis] for region in regions) for axis in range(axes)]
    return {
        tuple(
            next(outer for outer in along if _holds((outer,), (inner,)))
            for along, inner in zip(merged, region, strict=True)
        )
        for region in regions
    }


def _merged(ranges: Iterable[Range]) -> list[Range]:
    result: list[Range] = []
    for start, stop in sorted(set(ranges)):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def _holds(outer: Region, inner: Region) -> bool:
    return all(o[0] <= i[0] and i[1] <= o[1] for o, i in zip(outer, inner, strict=True))


def _within(inner: Region, outer: Region | None = None) -> Any:
    """Index of the inner region in an array that begins where the outer one does, or at 0."""
    starts = [start for start, _ in outer] if outer is not None else [0] * len(inner)
    return tuple(slice(a - start, b - start) for (a, b), start in zip(inner, starts, strict=True))


def _region(index: Any, shape: tuple[int, ...]) -> Region:
    bounds = (along.indices(size) for along, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def _empty(shape: list[int], dtype: Any) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _exchanged(own: Mapping[TensorId, str], tensors: list[TensorId]) -> dict[TensorId, str]:
    """The digests of all tensors, gathered from all processes: that of tensor i comes from process
    i modulo the number of processes."""
    table = np.zeros((len(tensors), 32), np.uint8)
    for number, tensor in enumerate(tensors):
        if tensor in own:
            table[number] = np.frombuffer(bytes.fromhex(own[tensor]), np.uint8)
    rows = multihost_utils.process_allgather(table).reshape(-1, *table.shape)
    return {
        tensor: bytes(rows[number % len(rows), number]).hex()
        for number, tensor in enumerate(tensors)
    }
