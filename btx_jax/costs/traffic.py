"""Main-memory traffic of HLO instructions."""

from collections.abc import Iterator

from btx_jax.costs.collectives import COLLECTIVES, goes_on
from btx_jax.costs.hlo import Computation, Computations, Instruction, called

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


def traffic(
    computations: Computations, computation: Computation, instruction: Instruction
) -> float:
    """Bytes of main memory that one execution of an instruction reads and writes. A slice counts
    its own size, not its operand's, even within nested fusions."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    operands = computation.operands(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(operands[1])
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * _size(instruction)
    if instruction.opcode.endswith("-start"):  # its result tuple repeats source and destination
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return _size(instruction)
        if any(called(instruction)):  # the instructions inside are charged instead
            return 0.0
        ends = [shape for shape in instruction.shapes if shape.dims][:2]
        return moved(instruction) * sum(not end.space for end in ends)
    if instruction.opcode != "fusion":
        return sum(map(_size, operands)) + _size(instruction)
    inside = _called(computations, instruction)
    # The buffers that a collective passes from one fusion to the next count once, where it starts.
    going = {i.name for i in inside.instructions.values() if i.opcode in COLLECTIVES and goes_on(i)}
    total = 0.0
    for parameter in (i for i in inside.instructions.values() if i.opcode == "parameter"):
        number = int(parameter.arguments)
        outer = operands[number] if number < len(operands) else parameter
        used = inside.users[parameter.name]
        if going and all(u.name in going or u.name == inside.root for u in used):
            continue
        total += min(_size(outer), _read(computations, inside, parameter, _size(outer)))
    if going:
        root = inside.instructions[inside.root]
        own = inside.operands(root) if root.opcode == "tuple" else []
        return total + sum(_size(i) for i in own if i.name not in going and i.opcode != "parameter")
    updates = list(_updates(computations, inside))
    return total + (sum(map(_size, updates)) if updates else _size(instruction))


def moved(start: Instruction) -> float:
    """Bytes that an asynchronous copy or slice moves: the size of the smaller of its source and
    destination, since the other may be a stack of such arrays."""
    return min((shape.bytes for shape in start.shapes if shape.dims), default=0.0)


def _read(
    computations: Computations, computation: Computation, value: Instruction, whole: float
) -> float:
    """Bytes that a computation reads from a value of `whole` bytes: the slices taken from it, or
    all of it if it is used in any other way."""
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode in ("dynamic-slice", "gather"):
            total += _size(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # in place: nothing is read
        elif user.opcode == "bitcast":
            total += _read(computations, computation, user, whole)
        elif user.opcode == "fusion":
            inside = _called(computations, user)
            for parameter in inside.instructions.values():
                if parameter.opcode == "parameter":
                    operand = user.operands[int(parameter.arguments)]
                    if operand == value.name:
                        total += _read(computations, inside, parameter, whole)
        else:
            total += whole
    return min(whole, total)


def _updates(computations: Computations, computation: Computation) -> Iterator[Instruction]:
    """Yield the values that dynamic-update-slices write in place."""
    for instruction in computation.instructions.values():
        if instruction.opcode == "dynamic-update-slice":
            yield computation.instructions[instruction.operands[1]]
        elif instruction.opcode == "fusion":
            yield from _updates(computations, _called(computations, instruction))


def _size(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if not shape.space)


def _called(computations: Computations, fusion: Instruction) -> Computation:
    return computations[fusion.attribute(r"calls=%?([\w.\-]+)")]
