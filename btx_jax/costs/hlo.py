"""Parser for XLA's optimised HLO text: computations, their instructions in scheduled order, and
trip counts of loops.

Format: openxla.org/xla, "HLO syntax".
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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

HOST = "S(5)"
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """An array's shape. space: the memory it is in, according to its layout: "" for main memory,
    HOST for the host's, any other S(n) for vector or scalar memory on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: str = ""

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BITS[self.dtype] / 8


@dataclass
class Instruction:
    name: str
    opcode: str
    shapes: list[Shape]  # several for a tuple
    operands: list[str]
    text: str  # after the operands
    arguments: str  # inside the operands' parentheses

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        return found[1] if found else ""

    @property
    def place(self) -> str:
        """The place in our program that the instruction comes from, such as
        jit(train_step)/.../layers_0/ffn/dot_general."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclass
class Computation:
    """A computation. instructions: in textual order, which is execution order in a scheduled
    module."""

    name: str = ""
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[o] for o in instruction.operands if o in self.instructions]

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Name of an instruction -> the instructions that use it as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for user in self.instructions.values():
            for operand in user.operands:
                users.setdefault(operand, []).append(user)
        return users


Computations = Mapping[str, Computation]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse a module: ({name: computation}, name of the entry computation)."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            name = header[2]
            computations[name] = Computation(name)
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
    shapes = [Shape(dtype, ints(dims), space) for dtype, dims, space in _SHAPE.findall(rest[:end])]
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


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def called(instruction: Instruction) -> Iterator[str]:
    """Yield the names of the computations that run once per execution of the instruction, which
    excludes the bodies of loops and reductions."""
    if instruction.opcode.removesuffix("-start") in ("fusion", "call", "conditional", "async"):
        for pattern in (
            r"calls=%?([\w.\-]+)",
            r"to_apply=%?([\w.\-]+)",
            r"(?:true|false)_computation=%?([\w.\-]+)",
        ):
            yield from re.findall(pattern, instruction.text)
        yield from _NAME.findall(instruction.attribute(r"branch_computations=\{([^}]*)\}"))


def trip_count(computations: Computations, caller: Computation, loop: Instruction) -> int:
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
        raise ValueError(
            f"loop {loop.name}: its trip count cannot be derived from {condition.root}"
        )
    index, body = int(indices[0]), computations[loop.attribute(r"body=%?([\w.\-]+)")]
    counter = _behind_copies(body, body.instructions[body.root].operands[index])
    steps = [
        i for i in (_behind_copies(body, o) for o in counter.operands) if i.opcode == "constant"
    ]
    if counter.opcode != "add" or len(steps) != 1:
        raise ValueError(f"loop {loop.name}: its step cannot be derived from {counter.name}")
    first = 0  # if no constant is found: all loops that XLA itself makes start at 0
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
