"""Compile check: compile a training config's step for a given TPU topology, on a machine without a
TPU.

Needs libtpu (`pip install btx_jax[tpu]`), but no TPU and no weights. Prints a table and writes
compile.json. It reports what the compiler decided (memory, FLOPs, collectives), how long it expects
the step to take (costs/clock.py), and lower bounds from data sheets; nothing is measured.
"""

import dataclasses
import functools
import heapq
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from jax.sharding import Mesh
from rich.table import Table

from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.chips import GIB, Chip, chip
from btx_jax.costs.clock import Clock, read_clock
from btx_jax.costs.kernels import filled, kernel_flops, rows_in_use
from btx_jax.costs.links import Slice
from btx_jax.costs.model import attention_flops, train_flops
from btx_jax.costs.program import Kernel, Program, read_program
from btx_jax.costs.refusals import read_refusal
from btx_jax.errors import ConfigError, UserError
from btx_jax.evaluation.heldout import lower_heldout_step
from btx_jax.models.leaves import is_feed_forward
from btx_jax.models.lora import partition
from btx_jax.output import new_file
from btx_jax.parallel.compiler_options import compiled
from btx_jax.parallel.topologies import DIMENSIONS, LARGEST_PLANE, parse_grid
from btx_jax.progress import clock
from btx_jax.terminal import Console, counted
from btx_jax.training.optimizer import is_trained
from btx_jax.training.probe import abstract_seed, is_probed
from btx_jax.training.start import (
    checked_mesh,
    dividing_accumulate,
    starting_point,
    trained_model,
)
from btx_jax.training.step import Part, decided, lower_train_step, shard_bytes, state_shardings

FILE = "compile.json"
# libtpu reads from its environment which machine it is on; any valid answer will do.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
VECTOR_CURE = (
    "one operation needs more vector memory (VMEM) than the chip has; more chips or smaller"
    " batches do not help: use --config.compute.kernels=xla, or another"
    " xla_tpu_scoped_vmem_limit_kib in config.compute.compiler_options"
)
DEAREST = 10  # most expensive operations to list
DISPATCH = ("gsd,gsec->egcd", "egcd,gsec->gsd")  # einsums that only move tokens


@dataclasses.dataclass
class Check:
    """Results for one step on one device, in bytes, FLOPs and seconds.

    flops: of grouped matmuls, `gmm` assumes balanced routing and `gmm_at_most` counts every row of
    their buffer. clock: from `costs.clock.Clock`, with the step's seconds, its MFU and the most
    expensive operations. floors: seconds that each resource alone would need. remat, accumulate:
    the values used, also where the config leaves them to be chosen.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    device_kind: str
    fits: bool
    # Memory for which the compiler refused: "total" (main memory), "vector", or "" if it did not.
    refused: str
    memory: dict[str, float]
    flops: dict[str, float]
    collectives: list[dict[str, Any]]
    clock: dict[str, Any]
    floors: dict[str, float]
    compile_seconds: float
    host_memory: float
    remat: str = ""
    accumulate: int = 0


def run(config: Config, workdir: Path, topology: str, num_slices: int) -> bool:
    """Check a config, print the result, write it to compile.json and return whether the step fits.
    Raises ConfigError for a config that trains nothing, UserError for an unknown topology."""
    if config.stage != "train":
        raise ConfigError(
            f"config.stage={config.stage!r}: only training configs, such as math_expert, can be"
            " compiled"
        )
    devices = topology_devices(topology, num_slices)
    model = (
        starting_point(config)[1] if config.model is None else trained_model(config, config.model)
    )
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(
        f"compiling the step of {workdir.name} for {counted(len(devices), 'chip')} of"
        f" {topology}; this takes some minutes for a 7B model ..."
    )
    result = check(config, model, devices, topology)
    print_check(result, console)
    changes: list[dict[str, Any]] = []
    if result.refused == "vector":
        console.print(VECTOR_CURE)
        changes = [{"change": VECTOR_CURE, "compiled": False}]
    elif not result.fits:
        assert config.compute and config.train
        compute = dataclasses.replace(config.compute, remat=result.remat)
        train = dataclasses.replace(config.train, accumulate=result.accumulate)
        tried = dataclasses.replace(config, compute=compute, train=train)
        changes = list(cures(tried, model, devices, topology, console))
    write(workdir / FILE, result, changes)
    console.print(f"wrote {workdir / FILE}")
    return result.fits


def topology_devices(topology: str, num_slices: int) -> Sequence[jax.Device]:
    """Abstract devices of `num_slices` slices of a topology such as `v5p:2x2x4`. Raises UserError
    if libtpu is missing or does not know the topology, or if there is no such slice."""
    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'btx_jax[tpu]'")
    parse_grid(topology)
    os.environ.update(
        {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    )
    jax.config.update("jax_platforms", "cpu")
    try:
        cores = (
            {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
        )  # one device per chip, as on other kinds
        description = topologies.get_topology_desc(
            topology_name=topology, platform="tpu", num_slices=num_slices, **cores
        )
    except Exception as error:  # jaxlib raises several types; all mean an unknown topology
        first = str(error).splitlines()[0]
        raise UserError(
            f"topology {topology}: unknown to libtpu ({first}); name one such as v5p:2x2x4 or"
            " v5e:4x4"
        ) from None
    return description.devices


def check(
    config: Config, model: ModelConfig, devices: Sequence[jax.Device], topology: str
) -> Check:
    assert config.train and config.data and config.compute
    mesh = checked_mesh(config, model, devices)
    kind = devices[0].device_kind
    limits = chip(kind)
    if limits is None:
        raise UserError(
            f"topology {topology}: {kind!r} is not in costs/chips.py; add its data sheet"
        )
    result = Check(
        topology,
        len(devices),
        dict(mesh.shape),
        kind,
        False,
        "",
        {"limit": limits.memory},
        {},
        [],
        {},
        {},
        0.0,
        0.0,
    )
    length = config.data.sequence_length
    compute, train = decided(model, config.compute, config.train, mesh, length)
    result.remat, result.accumulate = compute.remat, train.accumulate
    start = time.monotonic()
    lowered = lower_train_step(model, compute, train, mesh, length)
    try:
        with clock("compiling"):
            parts = [part._replace(program=compiled(part.program)) for part in lowered]
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if not refusal:
            raise
        result.refused = "vector" if refusal.vector else "total"
        result.memory |= {result.refused: refusal.needed} if refusal.needed else {}
        return result
    finally:
        result.compile_seconds = time.monotonic() - start
        result.host_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    result.memory |= max((_memory(part) for part in parts), key=lambda memory: memory["total"])
    if is_probed(model, config.train):
        params = state_shardings(model, config.train, mesh)[0].params
        result.memory["seed"] = shard_bytes(abstract_seed(params, config.train))
        result.memory["total"] += result.memory["seed"]
    if train.eval_every:
        micro_batch = train.batch_size // train.accumulate
        result.memory["heldout"] = _heldout_memory(config, model, mesh, micro_batch)
    result.fits = max(result.memory["total"], result.memory.get("heldout", 0.0)) <= limits.memory
    where = Slice.of(list(mesh.devices.flat), limits)
    expert_axis = mesh.shape["expert"]
    seconds = functools.partial(kernel_seconds, model=model, expert_axis=expert_axis, limits=limits)
    counted, read = Program(), Clock()
    for part in parts:
        text = part.program.as_text()
        read_program(text, part.times, counted)
        read_clock(text, limits, where, seconds, part.times, read)
    result.flops = count_flops(counted, config, model, len(devices), expert_axis)
    result.collectives = count_collectives(counted, read)
    result.clock = tell_clock(read, result.flops, limits)
    result.floors = floors(result.flops, counted, where)
    return result


def _memory(part: Part) -> dict[str, float]:
    """Memory of one device in bytes, by use. Arrays that must be in memory at the same time but are
    not arguments of the program count as arguments."""
    stats = part.program.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes + shard_bytes(part.beside),
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def _heldout_memory(config: Config, model: ModelConfig, mesh: Mesh, micro_batch: int) -> float:
    """Bytes needed per device while the held-out loss of `micro_batch` sequences is evaluated
    between two steps, including optimizer moments and, with the mixing probe, the seed and its
    average with the branch. If the compiler runs out of memory: the bytes it names, or infinity."""
    assert config.train and config.data and config.compute
    state = state_shardings(model, config.train, mesh)[0]
    lowered = lower_heldout_step(
        model, config.compute, mesh, state.params, micro_batch, config.data.sequence_length
    )
    try:
        used = Part(compiled(lowered)).bytes
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if not refusal:
            raise
        return refusal.needed or math.inf
    beside = shard_bytes(state.opt_state)
    if is_probed(model, config.train):
        shared = partition(state.params, is_feed_forward)[1]
        beside += shard_bytes(abstract_seed(state.params, config.train)) + shard_bytes(shared)
    return used + beside


def count_flops(
    program: Program, config: Config, model: ModelConfig, devices: int, expert_axis: int
) -> dict[str, float]:
    assert config.train and config.data
    tokens = config.train.batch_size * config.data.sequence_length
    attention_kernels = grouped = balanced = 0.0
    for kernel in program.kernels:
        # Averaged over layers: layers with a window run other kernels, but with the same shapes.
        executed = fmean(kernel_flops(kernel, spec.window) for spec in model.layer_specs())
        if "gmm" in kernel.name:
            grouped += executed
            balanced += executed * rows_in_use(kernel, model, expert_axis)
        else:
            attention_kernels += executed
    trained = functools.partial(is_trained, frozen=config.train.frozen)
    needed = train_flops(model, tokens, trained) / devices
    attention = attention_flops(model, tokens, config.data.sequence_length, trained) / devices
    moved = sum(
        flops
        for place, flops in program.by_place.items()
        if any(name in place for name in DISPATCH)
    )
    compiled = program.dot_flops + balanced + attention_kernels
    return {
        "dots": program.dot_flops,
        "gmm": balanced,
        "gmm_at_most": grouped,
        "attention_kernels": attention_kernels,
        "compiled": compiled,
        "model": needed,
        "model_attention": attention,
        "ratio": compiled / (needed + attention),
        "dispatch_share": moved / compiled,
    }


def kernel_seconds(kernel: Kernel, model: ModelConfig, expert_axis: int, limits: Chip) -> float:
    """Seconds of all executions of a kernel at the matrix unit's peak rate, since the compiler has
    no estimate for it."""
    flops = kernel_flops(kernel, model.window)
    if "gmm" in kernel.name:
        flops *= rows_in_use(kernel, model, expert_axis)
    return flops / limits.flops / filled(kernel, limits.array)


def count_collectives(program: Program, read: Clock) -> list[dict[str, Any]]:
    """One row for each kind of collective, within a slice and across slices: number of executions,
    bytes of the larger of operand and result, bytes sent, numbers of asynchronous and synchronous
    executions, hidden and exposed seconds."""
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for one in program.collectives:
        key = (one.kind, one.slices > 1)
        row = rows.setdefault(
            key,
            {
                "kind": one.kind,
                "across_slices": key[1],
                "count": 0,
                "bytes": 0.0,
                "wire_bytes": 0.0,
                **dataclasses.asdict(read.collectives[key]),
            },
        )
        row["count"] += one.trips
        row["bytes"] += one.bytes * one.trips
        row["wire_bytes"] += one.wire_bytes
    return [rows[key] for key in sorted(rows)]


def tell_clock(read: Clock, flops: dict[str, float], limits: Chip) -> dict[str, Any]:
    dearest = [
        {"place": place, "name": name, "seconds": seconds}
        for (place, name), seconds in heapq.nlargest(
            DEAREST, read.by_place.items(), key=lambda item: item[1]
        )
    ]
    sites = sorted(read.by_site.items(), key=lambda item: -item[1].exposed)
    return {
        "seconds": read.seconds,
        "mfu": (flops["model"] + flops["model_attention"]) / limits.flops / read.seconds,
        "cycles": read.cycles,
        "kernels": read.kernels,
        "moves": read.moves,
        "copies": read.copies,
        "exposed": read.exposed,
        "hidden": sum(kind.hidden for kind in read.collectives.values()),
        "dearest": dearest,
        "collectives": [
            {
                "kind": kind,
                "across_slices": is_across,
                "place": place,
                **dataclasses.asdict(traffic),
            }
            for (kind, is_across, place), traffic in sites
        ],
    }


def floors(flops: dict[str, float], program: Program, where: Slice) -> dict[str, float]:
    """Seconds that each resource alone would need; a step takes at least the longest of them."""
    inside = [one for one in program.collectives if one.slices == 1]
    across = [one for one in program.collectives if one.slices > 1]
    saved = program.int8_flops * (1 - 1 / where.chip.int8)
    return {
        "compute": (flops["compiled"] - saved) / where.chip.flops,
        "memory": program.memory_bytes / where.chip.bandwidth,
        "links": sum(where.seconds(one) * one.trips for one in inside),
        "network": sum(where.seconds(one) * one.trips for one in across),
    }


def cures(
    config: Config,
    model: ModelConfig,
    devices: Sequence[jax.Device],
    topology: str,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """Yield the changes tried to make the step fit, up to the first that succeeds: first changes
    that cost only time, each compiled, then more chips, which are not."""
    assert config.train and config.compute and config.mesh
    state_of_model = state_shardings(model, config.train, checked_mesh(config, model, devices))[0]
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_of_model))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    state = bytes_of_state * slices / len(devices)
    limits = chip(devices[0].device_kind)
    assert limits
    if state > 0.95 * limits.memory:
        chips = 2 * len(devices)
        while bytes_of_state * slices / chips > 0.8 * limits.memory:
            chips *= 2
        change = more_chips(config, chips, slices, topology)
        console.print(f"parameters and moments alone take {state / GIB:.1f} GiB per chip: {change}")
        yield {"change": change, "compiled": False}
        return
    for change, changed in _candidates(config, slices):
        try:
            found = check(changed, model, devices, topology)
        except UserError:
            continue
        total = found.memory.get("total")
        told = f"{total / GIB:.1f}" if total else "more"
        console.print(
            f"with {change}: {'fits' if found.fits else 'does not fit'}, {told} of"
            f" {limits.memory / GIB:.2f} GiB"
        )
        yield {"change": change, "compiled": True, "fits": found.fits, "memory": found.memory}
        if found.fits:
            return
    change = more_chips(config, 2 * len(devices), slices, topology)
    console.print(f"none of these is enough on {counted(len(devices), 'chip')}: {change}")
    yield {"change": change, "compiled": False}


def more_chips(config: Config, chips: int, slices: int, topology: str) -> str:
    """Advice such as "use 128 chips", with a number of micro-batches that divides over them where
    the config's does not; or that no slice of this kind is large enough."""
    assert config.train and config.mesh
    kind = parse_grid(topology)[0]
    if DIMENSIONS[kind] == 2 and chips > slices * LARGEST_PLANE:
        return f"it fits no slice of {kind}, use chips with more memory"
    accumulate = dividing_accumulate(
        config.train, chips // max(config.mesh.tensor, 1) // max(config.mesh.context, 1)
    )
    fewer = accumulate and accumulate != config.train.accumulate
    return f"use {chips} chips" + (f" with --config.train.accumulate={accumulate}" if fewer else "")


def _candidates(config: Config, slices: int) -> Iterator[tuple[str, Config]]:
    """Yield (flags, config) for each change to try; each includes the preceding ones."""
    assert config.mesh and config.compute and config.train
    mesh, compute, train = config.mesh, config.compute, config.train
    flags: list[str] = []
    if mesh.data not in (slices, -1):  # redundant replicas of the state
        flags.append(f"--config.mesh.data={slices} --config.mesh.fsdp=-1")
        config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=slices, fsdp=-1))
        yield flags[0], config
    less = {
        "none": ("ffn", "attention", "full"),
        "ffn": ("attention", "full"),
        "attention": ("full",),
    }
    told = ""
    for remat in less.get(compute.remat, ()):
        told = f"--config.compute.remat={remat}"
        config = dataclasses.replace(config, compute=dataclasses.replace(compute, remat=remat))
        yield " ".join([*flags, told]), config
    flags += [told] if told else []
    accumulate = train.accumulate * 2
    while train.batch_size % accumulate == 0:
        changed = dataclasses.replace(
            config, train=dataclasses.replace(train, accumulate=accumulate)
        )
        yield " ".join([*flags, f"--config.train.accumulate={accumulate}"]), changed
        accumulate *= 2


def _time(seconds: float) -> str:
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
    size, unit = next((u for u in units if seconds >= u[0]), units[-1] if seconds else units[0])
    return f"{seconds / size:.3g} {unit}"


def print_check(result: Check, console: Console) -> None:
    gib = lambda value: f"{value / GIB:.2f} GiB"  # noqa: E731
    table = Table(
        "per device and step",
        "",
        title=f"{result.topology}, {counted(result.devices, 'chip')}, mesh {result.mesh}",
        title_justify="left",
    )
    memory, flops, limit = result.memory, result.flops, result.memory["limit"]
    if result.refused:
        name = "vector memory of one operation" if result.refused == "vector" else "memory"
        there = "there is" if result.refused == "vector" else gib(limit)
        needed = gib(memory[result.refused]) if result.refused in memory else "more"
        table.add_row(name, f"does not fit: {needed} of {there}")
        console.print(table)
        return
    step = result.clock
    table.add_row(
        "step by the compiler's clock", f"{_time(step['seconds'])}, MFU {step['mfu']:.0%}"
    )
    parts = {name: step[name] for name in ("cycles", "kernels", "moves", "copies")}
    table.add_row(
        "  breakdown",
        ", ".join(f"{name} {_time(seconds)}" for name, seconds in parts.items())
        + f", exposed collectives {_time(step['exposed'])} ({_time(step['hidden'])} hidden)",
    )
    table.add_row(
        "floors, each resource alone",
        ", ".join(f"{name} {_time(seconds)}" for name, seconds in result.floors.items()),
    )
    table.add_row(
        "memory",
        f"{gib(memory['total'])} of {gib(limit)}: {'fits' if result.fits else 'does not fit'}",
    )
    table.add_row(
        "  arguments, temporaries, outputs",
        ", ".join(gib(memory[name]) for name in ("arguments", "temporaries", "outputs")),
    )
    if "seed" in memory:
        table.add_row("  the mixing probe's seed", gib(memory["seed"]))
    if "heldout" in memory:
        table.add_row(
            "memory, held-out loss", f"{gib(memory['heldout'])}, the optimizer's moments included"
        )
    table.add_row(
        "FLOPs compiled",
        f"{flops['compiled']:.3e}: dots {flops['dots']:.3e}, attention"
        f" {flops['attention_kernels']:.3e}, gmm {flops['gmm']:.3e} (at most"
        f" {flops['gmm_at_most']:.3e})",
    )
    table.add_row(
        "FLOPs of the model",
        f"{flops['model']:.3e} (6 N D, minus what frozen parameters save), attention"
        f" {flops['model_attention']:.3e}: compiled / model {flops['ratio']:.2f}",
    )
    table.add_row("micro-batches, remat", f"{result.accumulate}, {result.remat}")
    table.add_row("einsum dispatch", f"{flops['dispatch_share']:.1%} of the FLOPs")
    for row in result.collectives:
        where = "across slices" if row["across_slices"] else "inside a slice"
        table.add_row(
            f"{row['kind']}, {where}",
            f"{row['asynchronous']} async, {row['synchronous']} sync, {gib(row['bytes'])},"
            f" {gib(row['wire_bytes'])} sent: {_time(row['exposed'])} exposed,"
            f" {_time(row['hidden'])} hidden",
        )
    for one in step["dearest"]:
        table.add_row(f"  {_time(one['seconds'])}", f"{one['place']} ({one['name']})".strip())
    for one in step["collectives"][:DEAREST]:
        if one["exposed"]:
            counts = f"{one['asynchronous']} async, {one['synchronous']} sync"
            where = f"{one['kind']}: {one['place']} ({counts})"
            table.add_row(f"  {_time(one['exposed'])} exposed", where)
    table.add_row(
        "compiled in", f"{result.compile_seconds:.0f} s, {gib(result.host_memory)} on this machine"
    )
    console.print(table)


def write(path: Path, result: Check, changes: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        partial.write_text(
            json.dumps(dataclasses.asdict(result) | {"changes": changes}, indent=1) + "\n"
        )
