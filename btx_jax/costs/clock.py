"""Time of a compiled step according to the TPU compiler's own estimates: its cycles for every
operation, loops with their trip counts, and the part of collectives that no computation hides.

This is an estimate, not a measurement. The compiler writes `estimated_cycles` for the operations it
has scheduled. It cannot estimate Pallas kernels, whose time comes from their caller, and it omits
operations that only move memory, which are charged at the memory's bandwidth. Collectives take the
time that the slice's links need (`costs/links.py`). Asynchronous ones are transferred one after
another, in the order of their starts, while other operations run; those in the compiler's
continuation fusions progress only while these run. What remains when the end of a collective is
awaited is exposed.
"""

import collections
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from btx_jax.costs.chips import Chip
from btx_jax.costs.collectives import Collective, goes_on, of_instruction
from btx_jax.costs.hlo import (
    HOST,
    Computation,
    Computations,
    Instruction,
    called,
    parse,
    trip_count,
)
from btx_jax.costs.links import Slice
from btx_jax.costs.program import Kernel, kernel_of
from btx_jax.costs.traffic import moved, traffic

Kind = tuple[str, bool]  # kind of a collective; whether it crosses slices
Site = tuple[str, bool, str]  # kind; whether it crosses slices; its place in our program
_STRUCTURE = re.compile(
    r"jit\(.*?\)|while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|remat\d*"
    r"|(?:transpose\()?jvp\(.*?\)\)?"
)


@dataclass
class Traffic:
    """Totals for some collectives over all executions: how many are asynchronous and synchronous,
    and how many seconds are hidden behind computation and exposed."""

    asynchronous: int = 0
    synchronous: int = 0
    hidden: float = 0.0
    exposed: float = 0.0

    def add(self, other: "Traffic") -> None:
        self.asynchronous += other.asynchronous
        self.synchronous += other.synchronous
        self.hidden += other.hidden
        self.exposed += other.exposed


@dataclass
class Clock:
    """Seconds of a step, by kind.

    cycles: the compiler's estimated cycles. kernels: Pallas kernels. moves: operations for which
    the compiler estimates no cycles, at main-memory bandwidth. copies: the part of prefetches and
    of transfers to and from the host that is not hidden behind computation. by_site: totals of the
    collectives at each place. by_place: (place in our program, instruction) -> seconds of all
    executions.
    """

    cycles: float = 0.0
    kernels: float = 0.0
    moves: float = 0.0
    copies: float = 0.0
    by_site: dict[Site, Traffic] = field(default_factory=lambda: collections.defaultdict(Traffic))
    by_place: dict[tuple[str, str], float] = field(
        default_factory=lambda: collections.defaultdict(float)
    )

    @property
    def collectives(self) -> dict[Kind, Traffic]:
        """Totals by kind; all zero for a kind that the program does not contain."""
        kinds: dict[Kind, Traffic] = collections.defaultdict(Traffic)
        for (kind, is_across, _), site in self.by_site.items():
            kinds[kind, is_across].add(site)
        return kinds

    @property
    def exposed(self) -> float:
        return sum(site.exposed for site in self.by_site.values())

    @property
    def seconds(self) -> float:
        return self.cycles + self.kernels + self.moves + self.copies + self.exposed


def read_clock(
    text: str,
    chip: Chip,
    where: Slice,
    kernel_seconds: Callable[[Kernel], float],
    times: int = 1,
    clock: Clock | None = None,
) -> Clock:
    """Add the time of a scheduled module to `clock` (by default a new one) and return it.

    text: HLO of the module, which runs `times` times. where: the slice it runs on. kernel_seconds:
    returns the time of all executions of a kernel. Raises ValueError for a module without the
    compiler's cycles, and for a loop whose trip count cannot be read.
    """
    if "is_scheduled=true" not in text or "estimated_cycles" not in text:
        raise ValueError("the program has no cycle counts: it was not compiled for a TPU")
    computations, entry = parse(text)
    reader = _Reader(computations, chip, where, kernel_seconds, clock or Clock())
    reader.walk(computations[entry], times)
    return reader.clock


def place_of(op_name: str) -> str:
    """The part of an op_name that identifies our code:
    jit(step)/transpose(jvp(Llama))/while/body/layers_0/ffn/dot_general -> backward layers_0/ffn
    dot_general."""
    way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    words = [word for word in op_name.split("/") if word and not _STRUCTURE.fullmatch(word)]
    return " ".join(filter(None, (way, "/".join(words[:-1]), *words[-1:])))


@dataclass
class _Travelling:
    """A transfer in progress. site: None for a copy. remaining: seconds. fused: whether it
    progresses only during fusions that contain it. by_host: whether it goes to or comes from the
    host's memory."""

    name: str
    site: Site | None
    remaining: float
    fused: bool = False
    by_host: bool = False

    @property
    def way(self) -> str:
        """The resource that the transfer occupies, which serves one transfer at a time."""
        if self.site is None:
            return "host" if self.by_host else "memory"
        return "network" if self.site[1] else "links"


@dataclass
class _Reader:
    computations: Computations
    chip: Chip
    where: Slice
    kernel_seconds: Callable[[Kernel], float]
    clock: Clock

    def walk(self, computation: Computation, trips: int) -> None:
        """Account for one execution in schedule order, counted `trips` times."""
        under_way: list[_Travelling] = []
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                body = self.computations[instruction.attribute(r"body=%?([\w.\-]+)")]
                times = trip_count(self.computations, computation, instruction)
                self.walk(body, trips * times)
            elif opcode in ("call", "conditional"):
                for name in called(instruction):
                    self.walk(self.computations[name], trips)
            elif opcode.endswith("-done"):
                self._wait(under_way, instruction.operands[0], trips)
            elif opcode == "fusion":
                self._fusion(computation, instruction, under_way, trips)
            elif opcode.endswith("-start") or opcode in ("send", "recv"):
                self._start(computation, instruction, under_way, trips)
            elif collective := of_instruction(instruction, computation, trips):
                self._synchronous(collective, under_way, trips)
            else:
                self._compute(computation, instruction, under_way, trips)

    def _start(
        self, computation: Computation, start: Instruction, under_way: list[_Travelling], trips: int
    ) -> None:
        collective = of_instruction(start, computation, trips)
        for name in () if collective else called(start):  # an async-start wraps the collective
            inside = self.computations[name]
            found = (of_instruction(i, inside, trips) for i in inside.instructions.values())
            collective = next(filter(None, found), None)
        if collective:
            self._depart(start.name, collective, under_way)
        elif start.opcode != "recv":  # recv is charged by its send
            if any(shape.space == HOST for shape in start.shapes):
                to_host = _Travelling(start.name, None, moved(start) / self.chip.host, by_host=True)
                under_way.append(to_host)
                return
            seconds = traffic(self.computations, computation, start) / self.chip.bandwidth
            under_way.append(_Travelling(start.name, None, seconds))

    def _depart(
        self,
        name: str,
        collective: Collective,
        under_way: list[_Travelling],
        fused: bool = False,
    ) -> None:
        site = _site(collective)
        self.clock.by_site[site].asynchronous += collective.trips
        under_way.append(_Travelling(name, site, self.where.seconds(collective), fused))

    def _fusion(
        self,
        computation: Computation,
        fusion: Instruction,
        under_way: list[_Travelling],
        trips: int,
    ) -> None:
        """Account for a fusion, which may contain a whole collective, or may start, continue or end
        asynchronous ones."""
        inside = self.computations[next(called(fusion))]
        targets = [
            i.attribute(r'custom_call_target="([^"]*)"') for i in inside.instructions.values()
        ]
        held: list[str] = []
        for instruction in inside.instructions.values():
            collective = of_instruction(instruction, inside, trips)
            if not collective:
                continue
            name = " ".join(
                instruction.attribute(rf'{key}="?(\d+)') for key in ("channel_id", "chain_id")
            )
            if goes_on(instruction):
                held.append(name)
            elif "AsyncCollectiveStart" in targets:
                self._depart(name, collective, under_way, fused=True)
                held.append(name)
            else:
                self._synchronous(collective, under_way, trips)
        self._compute(computation, fusion, under_way, trips, held)
        if "AsyncCollectiveDone" in targets:
            for name in held:
                self._wait(under_way, name, trips)

    def _synchronous(
        self, collective: Collective, under_way: list[_Travelling], trips: int
    ) -> None:
        site = self.clock.by_site[_site(collective)]
        site.synchronous += trips
        seconds = self.where.seconds(collective)
        site.exposed += trips * seconds
        self._advance(under_way, seconds, trips, [], links=False)

    def _compute(
        self,
        computation: Computation,
        instruction: Instruction,
        under_way: list[_Travelling],
        trips: int,
        held: list[str] | None = None,
    ) -> None:
        if cycles := instruction.attribute(r'"estimated_cycles":"(\d+)"'):
            seconds = int(cycles) / self.chip.clock
            self.clock.cycles += trips * seconds
        elif kernel := kernel_of(instruction, computation, 1):
            seconds = self.kernel_seconds(kernel)
            self.clock.kernels += trips * seconds
        elif _holds_collective(self.computations, instruction):
            return  # charged as a kernel
        else:
            seconds = traffic(self.computations, computation, instruction) / self.chip.bandwidth
            self.clock.moves += trips * seconds
        self.clock.by_place[(place_of(instruction.place), instruction.name)] += trips * seconds
        self._advance(under_way, seconds, trips, held or [])

    def _advance(
        self,
        under_way: list[_Travelling],
        seconds: float,
        trips: int,
        held: list[str],
        links: bool = True,
    ) -> None:
        """Advance the transfers in progress by `seconds`, during which something else runs. held:
        collectives that the running fusion contains. links: whether the links are free."""
        left = dict.fromkeys(("memory", "host", "network", "links"), seconds)
        left["links"] *= links
        for one in under_way:
            if one.fused and one.name not in held:
                continue
            moved = min(one.remaining, left[one.way])
            one.remaining -= moved
            left[one.way] -= moved
            if one.site:
                self.clock.by_site[one.site].hidden += trips * moved

    def _wait(self, under_way: list[_Travelling], name: str, trips: int) -> None:
        one = next((one for one in under_way if one.name == name), None)
        if one is None:
            return  # started in another computation
        under_way.remove(one)
        if one.site:
            self.clock.by_site[one.site].exposed += trips * one.remaining
        else:
            self.clock.copies += trips * one.remaining
        self._advance(under_way, one.remaining, trips, [], links=one.way != "links")


def _site(collective: Collective) -> Site:
    return collective.kind, collective.slices > 1, place_of(collective.where)


def _holds_collective(computations: Computations, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return False
    inside = computations[next(called(instruction))]
    return any(of_instruction(i, inside, 1) for i in inside.instructions.values())
