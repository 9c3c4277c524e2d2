"""The work of a compiled program: FLOPs, kernels and collectives read from XLA's optimised HLO
text, with loop trip counts.

XLA's own cost analysis counts a loop's body once, and on TPUs XLA turns gathers and scatters of
weights into loops.
"""

import collections
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from btx_jax.costs.collectives import Collective, goes_on, of_instruction
from btx_jax.costs.hlo import Computation, Computations, Instruction, Shape, called, ints, parse
from btx_jax.costs.hlo import trip_count as trips_of
from btx_jax.costs.traffic import traffic


@dataclass(frozen=True)
class Kernel:
    """One custom call: its name, shapes of its operands and results, and number of executions."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    trips: int


@dataclass
class Program:
    """Totals of a program. dot_flops: FLOPs of all executed dots and convolutions. int8_flops: the
    part of them whose operands are int8. by_place: dot_flops by op_name. memory_bytes: main-memory
    traffic of fusions, kernels and other operations outside fusions, assuming that nothing stays in
    a cache between them."""

    dot_flops: float = 0.0
    int8_flops: float = 0.0
    memory_bytes: float = 0.0
    by_place: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


def read_program(text: str, times: int = 1, program: Program | None = None) -> Program:
    """Add the totals of a program that runs `times` times to `program` (by default a new one) and
    return it. text: its optimised HLO. Raises ValueError, naming the loop, for a trip count that
    cannot be read: no count is better than a wrong one."""
    computations, entry = parse(text)
    program = program or Program()
    _walk(computations, computations[entry], times, program, in_fusion=False)
    return program


def kernel_of(instruction: Instruction, computation: Computation, trips: int) -> Kernel | None:
    """The Pallas kernel that an instruction calls; None for others. Raises ValueError for a custom
    call of unknown FLOPs."""
    if instruction.opcode != "custom-call":
        return None
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    if "matmul" in target:
        raise ValueError(f"custom call {target!r}: its FLOPs are not known")
    if target != "tpu_custom_call":
        return None
    operands = tuple(s for o in computation.operands(instruction) for s in o.shapes)
    name = re.sub(r"[.\d]+$", "", instruction.name)
    return Kernel(name, operands, tuple(instruction.shapes), trips)


def _walk(
    computations: Computations,
    computation: Computation,
    trips: int,
    program: Program,
    in_fusion: bool,
) -> None:
    for instruction in computation.instructions.values():
        if not in_fusion:
            program.memory_bytes += trips * traffic(computations, computation, instruction)
        if instruction.opcode == "while":
            body = computations[instruction.attribute(r"body=%?([\w.\-]+)")]
            times = trips_of(computations, computation, instruction)
            _walk(computations, body, trips * times, program, in_fusion)
        elif instruction.opcode in ("dot", "convolution"):
            operands = [s for o in computation.operands(instruction) for s in o.shapes]
            count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            flops: float = trips * count(instruction, operands)
            program.dot_flops += flops
            if all(shape.dtype == "s8" for shape in operands):
                program.int8_flops += flops
            program.by_place[instruction.place] += flops
        elif collective := of_instruction(instruction, computation, trips):
            if not goes_on(instruction):
                program.collectives.append(collective)
        elif kernel := kernel_of(instruction, computation, trips):
            program.kernels.append(kernel)
        else:
            inside = in_fusion or instruction.opcode == "fusion"
            for name in called(instruction):
                _walk(computations, computations[name], trips, program, inside)


def _dot_flops(dot: Instruction, operands: Sequence[Shape]) -> float:
    contracted = ints(dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * math.prod(dot.shapes[0].dims) * math.prod(operands[0].dims[i] for i in contracted)


def _convolution_flops(convolution: Instruction, operands: Sequence[Shape]) -> float:
    """FLOPs of a convolution. XLA expresses matmuls on TPUs as convolutions whose windows are
    mostly padding, so only taps on real elements count."""
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
    """Number of (output, kernel position) pairs along one spatial axis that hit an element of the
    input."""
    if size == 1 and low == 0 and stride == 1 and lhs_dilate == 1:
        return min(inputs, outputs)
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * rhs_dilate - low
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < inputs)).sum())
