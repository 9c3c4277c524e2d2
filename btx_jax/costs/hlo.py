"""What a compiled program does: FLOPs and collectives read from XLA's optimised HLO text, with loop
trip counts.

XLA's own cost analysis counts a loop's body once, and on TPUs it turns gathers and scatters of
weights into loops. Format: XLA's HLO text (openxla.org/xla, "HLO syntax").
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
}
BITS |= {"s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """on_chip: in vector or scalar memory (layout S(n)), where reading costs nothing of the main
    memory's bandwidth."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BITS[self.dtype] / 8


@dataclass
class Instruction:
    name: str
    opcode: str
    shapes: list[Shape]  # several for a tuple
    operands: list[str]
    text: str  # what follows the operands
    arguments: str  # inside the operands' parentheses

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        return found[1] if found else ""


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: of the larger of its operand and result, per device and
    execution; groups: of device positions, pairs (source, target) for a collective-permute."""

    kind: str
    bytes: float
    trips: int
    groups: tuple[tuple[int, ...], ...]
    where: str  # op_name: the place in our program
    slices: int = (
        1  # more than one: the part of a collective that crosses slices, through the hosts
    )

    @property
    def group_size(self) -> int:
        return self.slices if self.slices > 1 else max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """What a device sends in all executions, by the algorithms that send least: an all-reduce
        is a reduce-scatter and a gather."""
        n = self.group_size
        share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}.get(
            self.kind, (n - 1) / n
        )
        return self.bytes * share * self.trips


@dataclass(frozen=True)
class Kernel:
    """One custom call: its name, its operands' and results' shapes, and how often it runs."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    trips: int


@dataclass
class Program:
    """dot_flops: of every dot and convolution, executed. by_place: the same by op_name.
    memory_bytes: what operations outside fusions read and write of the main memory, kernels
    included, as if nothing stayed in a cache between two of them."""

    dot_flops: float = 0.0
    memory_bytes: float = 0.0
    by_place: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


def read(text: str) -> Program:
    """Raises ValueError, naming it, for a loop whose trip count cannot be read: a count that may be
    wrong is worse than none."""
    computations, entry = parse(text)
    program = Program()
    _walk(computations, entry, 1, program, in_fusion=False)
    return program


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({name: computation}, name of the entry)."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            name = header[2]
            computations[name] = Computation()
            entry = name if header[1] else entry
        elif name and " = " in line and line.startswith("  "):
            instruction = _instruction(line.strip())
            computations[name].instructions[instruction.name] = instruction
            if line.startswith("  ROOT "):
                computations[name].root = instruction.name
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = [
        Shape(dtype, _ints(dims), bool(space)) for dtype, dims, space in _SHAPE.findall(rest[:end])
    ]
    opcode, _, _ = (called := rest[end:].lstrip()).partition("(")
    start = len(opcode)
    close = _closing(called, start)
    arguments = called[start + 1 : close]
    return Instruction(
        name.removeprefix("%"),
        opcode,
        shapes,
        _NAME.findall(arguments),
        called[close + 1 :],
        arguments,
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _walk(
    computations: Mapping[str, Computation],
    name: str,
    trips: int,
    program: Program,
    in_fusion: bool,
) -> None:
    computation = computations[name]
    for instruction in computation.instructions.values():
        if not in_fusion:
            program.memory_bytes += trips * _traffic(computations, computation, instruction)
        opcode = instruction.opcode.removesuffix("-start")
        operands = [
            shape
            for o in instruction.operands
            if o in computation.instructions
            for shape in computation.instructions[o].shapes
        ]
        place = instruction.attribute(r'op_name="([^"]*)"')
        if opcode == "while":
            times = _trip_count(computations, computation, instruction)
            _walk(
                computations,
                instruction.attribute(r"body=%?([\w.\-]+)"),
                trips * times,
                program,
                in_fusion,
            )
        elif opcode in ("dot", "convolution"):
            flops: float = trips * (_dot_flops if opcode == "dot" else _convolution_flops)(
                instruction, operands
            )
            program.dot_flops += flops
            program.by_place[place] += flops
        elif opcode in COLLECTIVES:
            if _goes_on(instruction):
                continue
            # The -start form's result is a tuple that repeats the operand; scalars in it are
            # bookkeeping.
            size = max(
                sum(s.bytes for s in operands),
                max((s.bytes for s in instruction.shapes), default=0),
            )
            if opcode == "all-reduce" and name.startswith("all-reduce-scatter"):
                # The TPU's own form of it: an all-reduce and a slice, fused into one ring
                opcode = "reduce-scatter"
            groups = _groups(instruction)
            if not groups or max(map(len, groups)) > 1:  # one device alone exchanges nothing
                program.collectives.append(Collective(opcode, size, trips, groups, place))
        elif opcode == "send" and "_xla_megascale_transfer_type" in instruction.text:
            kind = (
                instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
                .lower()
                .replace("_", "-")
            )
            slices = instruction.attribute(r'_xla_megascale_target="\{([\d,]+)\}')
            program.collectives.append(
                Collective(kind, operands[0].bytes, trips, (), place, slices.count(",") + 1)
            )
        elif opcode == "custom-call":
            if (
                target := instruction.attribute(r'custom_call_target="([^"]*)"')
            ) == "tpu_custom_call":
                kernel = re.sub(r"[.\d]+$", "", instruction.name)
                program.kernels.append(
                    Kernel(kernel, tuple(operands), tuple(instruction.shapes), trips)
                )
            elif "matmul" in target:
                raise ValueError(f"custom call {target!r}: its FLOPs are not known")
        else:
            for called in _called(instruction):
                _walk(
                    computations,
                    called,
                    trips,
                    program,
                    in_fusion or instruction.opcode == "fusion",
                )


def _goes_on(collective: Instruction) -> bool:
    """A TPU hides a collective behind several fusions in turn: each holds the whole instruction,
    only the first of them has no flag."""
    return bool(re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', collective.text))


FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
)


def _traffic(
    computations: Mapping[str, Computation], computation: Computation, instruction: Instruction
) -> float:
    """Bytes of main memory that one execution reads and writes. Slices count by their own size, not
    by that of what they cut."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    size = lambda i: sum(s.bytes for s in i.shapes if not s.on_chip)  # noqa: E731
    operands = [
        computation.instructions[o] for o in instruction.operands if o in computation.instructions
    ]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(operands[1])
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * size(instruction)
    if instruction.opcode != "fusion":
        return sum(map(size, operands)) + size(instruction)
    called = computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
    inside, root = called.instructions, called.root
    users = collections.defaultdict(list)
    for user in inside.values():
        for operand in user.operands:
            users[operand].append(user)
    # What a collective that goes on hands through from fusion to fusion is written once, where it
    # starts.
    going = {i.name for i in inside.values() if i.opcode in COLLECTIVES and _goes_on(i)}
    total = 0.0
    for parameter in (i for i in inside.values() if i.opcode == "parameter"):
        outer = (
            operands[int(parameter.arguments)]
            if int(parameter.arguments) < len(operands)
            else parameter
        )
        whole, used = size(outer), users[parameter.name]
        if going and all(u.name in going or u.name == root for u in used):
            continue
        if used and all(u.opcode in ("dynamic-slice", "gather") for u in used):
            whole = min(whole, sum(size(u) for u in used))
        elif used and all(
            u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in used
        ):
            whole = 0.0  # written in place: the update is counted below
        total += whole
    if going:
        own = [inside[o] for o in inside[root].operands] if inside[root].opcode == "tuple" else []
        return total + sum(size(i) for i in own if i.name not in going and i.opcode != "parameter")
    updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice"]
    result = (
        sum(size(inside[u.operands[1]]) for u in updates if u.operands[1] in inside)
        if updates
        else size(instruction)
    )
    return total + result


def _called(instruction: Instruction) -> Iterator[str]:
    """Computations that run once when the instruction does; a reduction's is not one of them."""
    if instruction.opcode in ("fusion", "call", "conditional", "async-start"):
        for pattern in (
            r"calls=%?([\w.\-]+)",
            r"to_apply=%?([\w.\-]+)",
            r"(?:true|false)_computation=%?([\w.\-]+)",
        ):
            yield from re.findall(pattern, instruction.text)
        yield from _NAME.findall(instruction.attribute(r"branch_computations=\{([^}]*)\}"))


def _trip_count(
    computations: Mapping[str, Computation], caller: Computation, loop: Instruction
) -> int:
    if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    constants = [
        int(i.arguments)
        for i in condition.instructions.values()
        if i.opcode == "constant" and i.arguments.lstrip("-").isdigit()
    ]
    compare = condition.instructions[condition.root]
    indices = [
        i.attribute(r"index=(\d+)")
        for i in condition.instructions.values()
        if i.opcode == "get-tuple-element"
    ]
    if (
        len(constants) != 1
        or len(indices) != 1
        or (compare.opcode == "compare" and "direction=LT" not in compare.text)
    ):
        raise ValueError(f"loop {loop.name}: its trip count cannot be read from {condition.root}")
    index, body = int(indices[0]), computations[loop.attribute(r"body=%?([\w.\-]+)")]
    counter = _behind_copies(body, body.instructions[body.root].operands[index])
    steps = [
        i for i in (_behind_copies(body, o) for o in counter.operands) if i.opcode == "constant"
    ]
    if counter.opcode != "add" or len(steps) != 1:
        raise ValueError(f"loop {loop.name}: its step cannot be read from {counter.name}")
    first = 0  # as everywhere in XLA's own loops, when no constant is in sight
    inputs = _behind_copies(caller, loop.operands[0])
    if inputs.opcode == "tuple":
        start = _behind_copies(caller, inputs.operands[index])
        first = int(start.arguments) if start.opcode == "constant" else 0
    return math.ceil((constants[0] - first) / int(steps[0].arguments))


def _behind_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _dot_flops(dot: Instruction, operands: Sequence[Shape]) -> float:
    contracted = _ints(dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * math.prod(dot.shapes[0].dims) * math.prod(operands[0].dims[i] for i in contracted)


def _convolution_flops(convolution: Instruction, operands: Sequence[Shape]) -> float:
    """TPUs see matmuls as convolutions, with windows that are mostly padding: only taps on real
    elements are work."""
    lhs_labels, rhs_labels, out_labels = re.split(
        r"_|->", convolution.attribute(r"dim_labels=(\S+?)(?:,|$)")
    )
    lhs, rhs, out = operands[0].dims, operands[1].dims, convolution.shapes[0].dims
    window = convolution.attribute(r"window=\{([^}]*)\}")
    fields = dict(part.split("=") for part in window.split())
    taps = 1
    for n in range(len(lhs_labels) - 2):
        size, pad = rhs[rhs_labels.index(str(n))], fields.get("pad", "").split("x")
        low = int(pad[n].split("_")[0]) if n < len(pad) and pad[n] else 0
        stride, lhs_dilate, rhs_dilate = (
            int(fields[key].split("x")[n]) if key in fields else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        taps *= _taps(
            lhs[lhs_labels.index(str(n))],
            out[out_labels.index(str(n))],
            size,
            low,
            stride,
            lhs_dilate,
            rhs_dilate,
        )
    features = rhs[rhs_labels.index("i")] * out[out_labels.index("f")]
    return 2.0 * out[out_labels.index("b")] * features * taps


@functools.lru_cache(maxsize=4096)
def _taps(
    inputs: int, outputs: int, size: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """(output, kernel position) pairs of one spatial axis that meet an element of the input."""
    if size == 1 and low == 0 and stride == 1 and lhs_dilate == 1:
        return min(inputs, outputs)
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * rhs_dilate - low
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < inputs)).sum())


def _groups(collective: Instruction) -> tuple[tuple[int, ...], ...]:
    text = collective.text
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return tuple(_ints(pair) for pair in re.findall(r"\{([\d,]*)\}", pairs[1]))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return tuple(_ints(group) for group in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", text):
        return tuple(
            tuple(int(d) for d in group) for group in _iota(iota[2]).reshape(_ints(iota[1]))
        )
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}", text
    ):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if "replica_groups={}" in text:
        return ()
    raise ValueError(f"{collective.name}: its groups cannot be read: {text[:200]}")


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0) -> the devices 0..7 as a grid of 4 by 2, transposed, flat."""
    sizes, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    devices = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return (devices.transpose(_ints(order)) if order else devices).reshape(-1)


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=4,'b'=2] {'a':(2)2}: 8 devices in a grid; groups along axes, or along a part of one,
    (what is before it)its own size."""
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
