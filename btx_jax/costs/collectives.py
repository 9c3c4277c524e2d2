"""Collectives of a compiled program: what is exchanged between which devices."""

import math
import re
from dataclasses import dataclass

import numpy as np

from btx_jax.costs.hlo import Computation, Instruction, ints

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: size of the larger of operand and result, per device
    and execution. trips: number of executions. groups: groups of device positions that exchange
    data; (source, target) pairs for a collective-permute."""

    kind: str
    bytes: float
    trips: int
    groups: tuple[tuple[int, ...], ...]
    where: str  # op_name: the place in our program
    slices: int = 1  # more than one: the part that crosses slices over the hosts' network

    @property
    def group_size(self) -> int:
        return self.slices if self.slices > 1 else max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends over all executions, assuming the algorithms that send least:
        an all-reduce counts as a reduce-scatter and an all-gather."""
        n = self.group_size
        share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}.get(
            self.kind, (n - 1) / n
        )
        return self.bytes * share * self.trips


def of_instruction(
    instruction: Instruction, computation: Computation, trips: int
) -> Collective | None:
    """The collective that an instruction performs or starts, executed `trips` times; None if there
    is none, or if its groups are single devices, which exchange nothing."""
    kind = instruction.opcode.removesuffix("-start")
    operands = [s for o in computation.operands(instruction) for s in o.shapes]
    place = instruction.place
    if kind == "send" and "_xla_megascale_transfer_type" in instruction.text:
        transfer = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        slices = instruction.attribute(r'_xla_megascale_target="\{([\d,]+)\}')
        name = transfer.lower().replace("_", "-")
        return Collective(name, operands[0].bytes, trips, (), place, slices.count(",") + 1)
    if kind not in COLLECTIVES:
        return None
    # The -start form returns a tuple that repeats the operand; scalars in it are bookkeeping.
    size = max(
        sum(s.bytes for s in operands), max((s.bytes for s in instruction.shapes), default=0)
    )
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU form: an all-reduce and a slice fused in one ring
    groups = groups_of(instruction)
    if groups and max(map(len, groups)) == 1:
        return None
    return Collective(kind, size, trips, groups, place)


def goes_on(collective: Instruction) -> bool:
    """Whether an instruction continues a collective that an earlier one started. TPUs hide a
    collective behind several consecutive fusions, each of which contains the whole instruction;
    only in the first does it have no flag."""
    return bool(re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', collective.text))


def groups_of(collective: Instruction) -> tuple[tuple[int, ...], ...]:
    text = collective.text
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return tuple(ints(pair) for pair in re.findall(r"\{([\d,]*)\}", pairs[1]))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return tuple(ints(group) for group in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", text):
        return tuple(
            tuple(int(d) for d in group) for group in _iota(iota[2]).reshape(ints(iota[1]))
        )
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}", text
    ):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if "replica_groups={}" in text:
        return ()
    raise ValueError(f"{collective.name}: its groups cannot be parsed: {text[:200]}")


def _iota(text: str) -> np.ndarray:
    """Parse an iota list: [4,2]T(1,0) -> devices 0..7 as a 4 by 2 grid, transposed, flattened."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match, text
    sizes, order = match.groups()
    devices = np.arange(math.prod(ints(sizes))).reshape(ints(sizes))
    return (devices.transpose(ints(order)) if order else devices).reshape(-1)


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> tuple[tuple[int, ...], ...]:
    """Parse groups in mesh notation. mesh['a'=4,'b'=2] {'a':(2)2} has 8 devices in a grid; a group
    spans whole axes, or a part of one, written (size before the part)size of the part."""
    named = re.findall(r"('\w+')=(\d+)", axes)
    chosen = re.findall(r"('\w+')(?::\((\d+)\)(\d+))?", grouped)
    sizes: list[int] = []
    places: dict[tuple[str, str, str], int] = {}
    for name, size in named:
        rest = int(size)
        for key in sorted((c for c in chosen if c[0] == name), key=lambda c: int(c[1] or 1)):
            before, own = (int(key[1]), int(key[2])) if key[1] else (1, int(size))
            done = int(size) // rest
            sizes += [before // done, own]
            places[key] = len(sizes) - 1
            rest = int(size) // (before * own)
        sizes.append(rest)
    devices = (_iota(ids) if ids else np.arange(math.prod(sizes))).reshape(sizes)
    last = [places[key] for key in chosen]
    rows = devices.transpose([i for i in range(len(sizes)) if i not in last] + last)
    return tuple(
        tuple(int(d) for d in row) for row in rows.reshape(-1, math.prod(sizes[i] for i in last))
    )
