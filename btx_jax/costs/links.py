"""Time of a collective on the actual links of a slice.

Chips form a grid of two or three dimensions, each chip linked to its neighbours. Along a dimension
that wraps around, every chip has two links. Along one that does not, the chips at its ends have
only one, which must carry all the data that they gather.
"""

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from btx_jax.costs.chips import Chip
from btx_jax.costs.collectives import Collective

HOP = 1e-6  # seconds per hop, regardless of size (scaling-book, "TPU networking")
BESIDE = 6  # bandwidth between two devices of one chip, in links (tpu7x)

Coords = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """A slice's grid. places: grid position of each device, in the order in which collectives
    number devices. sides: length of each dimension. wraps: whether each dimension is a ring."""

    places: tuple[Coords, ...]
    sides: tuple[int, ...]
    wraps: tuple[bool, ...]
    chip: Chip

    @classmethod
    def of(cls, devices: Sequence[jax.Device], chip: Chip) -> "Slice":
        """Make the grid from devices in the order of the program's mesh: those of one slice, or of
        several equal ones."""
        places = tuple(tuple(device.coords) for device in devices)
        sides = tuple(1 + max(place[d] for place in places) for d in range(len(places[0])))
        cubes = all(side % 4 == 0 for side in sides)
        wraps = tuple(cubes if chip.cube else side == 16 for side in sides)
        return cls(places, sides, wraps, chip)

    def seconds(self, collective: Collective) -> float:
        """Seconds of one execution: the longer of the busiest link's transfer time and the longest
        path's latency."""
        if collective.slices > 1:
            return collective.wire_bytes / collective.trips / self.chip.network
        groups = collective.groups or (tuple(range(len(self.places))),)
        if collective.kind == "collective-permute":
            return self._permute(collective.bytes, groups)
        return max(
            self._within(collective, group)
            for group in {self._shape(g): g for g in groups}.values()
        )

    def _shape(self, group: Sequence[int]) -> tuple[Coords, ...]:
        """A group's positions relative to its lowest corner: groups that differ only by a
        translation take equally long."""
        places = [self.places[i] for i in group]
        low = [min(axis) for axis in zip(*places, strict=True)]
        return tuple(sorted(tuple(c - m for c, m in zip(p, low, strict=True)) for p in places))

    def _within(self, collective: Collective, group: Sequence[int]) -> float:
        chips = sorted({self.places[i] for i in group})
        shared = self.chip.per_chip / (len(group) / len(chips))  # groups that share a chip's links
        if len(chips) == 1:
            return collective.bytes / (BESIDE * self.chip.link)
        rate, hops, worst = 0.0, 0, 0.0
        axes = [sorted(set(axis)) for axis in zip(*chips, strict=True)]
        whole = math.prod(map(len, axes)) == len(chips)  # a full grid, not a part of one
        for axis, side, wraps in zip(axes, self.sides, self.wraps, strict=True):
            if len(axis) == 1:
                continue
            stride = (axis[-1] - axis[0]) / (len(axis) - 1)  # this many groups share the links
            ring = wraps and len(axis) * stride == side
            found = (2 if ring else 1) * self.chip.link / stride
            rate = rate + found if whole else max(rate, found)
            hops += math.ceil((axis[-1] - axis[0]) / (2 if ring else 1))
            # All-to-all: each half of the group sends half of its data to the other half, across
            # one or two links per row.
            worst = max(worst, len(axis) / 4 / found)
        share = 1 - 1 / len(chips)
        passes = {"all-reduce": 2}.get(collective.kind, 1)
        if collective.kind.endswith("all-to-all"):
            return max(hops * HOP, shared * collective.bytes * worst)
        return passes * max(hops * HOP, shared * collective.bytes * share / rate)

    def _permute(self, size: float, pairs: Sequence[Sequence[int]]) -> float:
        """Seconds of a permutation in which every message takes the shortest path, dimension by
        dimension."""
        load: collections.Counter[tuple[Coords, int, int]] = collections.Counter()
        farthest = 0
        for source, target in pairs:
            here, hops = list(self.places[source]), 0
            for axis, side in enumerate(self.sides):
                way = self.places[target][axis] - here[axis]
                if self.wraps[axis] and abs(way) > side / 2:
                    way -= side if way > 0 else -side
                step = 1 if way > 0 else -1
                for _ in range(abs(way)):
                    load[(tuple(here), axis, step)] += 1
                    here[axis] = (here[axis] + step) % side
                    hops += 1
            farthest = max(farthest, hops)
        busiest = max(load.values(), default=0)
        if not busiest:
            return size / (BESIDE * self.chip.link)
        return max(farthest * HOP, busiest * size / self.chip.link)
