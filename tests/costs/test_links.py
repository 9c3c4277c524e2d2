"""Times of collectives on the links of real slices, compared with manual calculations."""

import itertools
from types import SimpleNamespace

import pytest

from btx_jax.costs.chips import CHIPS
from btx_jax.costs.collectives import Collective
from btx_jax.costs.links import BESIDE, HOP, Slice

V5E, V5P, V7X = (CHIPS[kind] for kind in ("TPU v5 lite", "TPU v5", "TPU7x"))
B = 64e6  # bytes: far more than sent in the latency of a hop


def a_slice(chip, *sides):
    places = itertools.product(*map(range, sides))
    places = [place for place in places for _ in range(chip.per_chip)]
    return Slice.of([SimpleNamespace(coords=place) for place in places], chip)


def seconds(where, kind, groups, size=B):
    return where.seconds(Collective(kind, size, 7, groups, ""))


def test_a_corner_bounds_a_gather_where_nothing_wraps_around():
    everybody = (tuple(range(16)),)
    assert seconds(a_slice(V5E, 4, 4), "all-gather", everybody) == pytest.approx(
        B * 15 / 16 / (2 * V5E.link)
    ), "a corner chip of a v5e 4x4 has 2 of 4 links"
    everybody = (tuple(range(8)),)
    assert seconds(a_slice(V5P, 2, 2, 2), "reduce-scatter", everybody) == pytest.approx(
        B * 7 / 8 / (3 * V5P.link)
    ), "a chip of a v5p 2x2x2 has 3 of 6 links"


def test_whole_cubes_and_sides_of_16_are_rings():
    assert a_slice(V5P, 4, 4, 8).wraps == (True, True, True)
    assert a_slice(V5P, 2, 2, 4).wraps == (False, False, False)
    assert a_slice(V5E, 8, 16).wraps == (False, True)
    everybody = (tuple(range(64)),)
    assert seconds(a_slice(V5P, 4, 4, 4), "all-gather", everybody) == pytest.approx(
        B * 63 / 64 / (6 * V5P.link)
    )


def test_groups_along_one_side_have_its_links_alone():
    columns = tuple(tuple(range(i, 16, 4)) for i in range(4))
    where = a_slice(V5E, 4, 4)
    once = B * 3 / 4 / V5E.link
    assert seconds(where, "reduce-scatter", columns) == pytest.approx(once)
    assert seconds(where, "all-reduce", columns) == pytest.approx(2 * once)
    every_second = tuple((i, i + 8) for i in (*range(4), *range(4, 8)))
    assert seconds(where, "all-gather", every_second) == pytest.approx(B / 2 * 2 / V5E.link), (
        "two groups in a column share its links"
    )


def test_the_middle_bounds_an_all_to_all():
    """In a row of 4, two chips each have half of their bytes for the other two."""
    assert seconds(a_slice(V5E, 4, 1), "all-to-all", ((0, 1, 2, 3),)) == pytest.approx(B / V5E.link)
    ring = a_slice(V5P, 4, 4, 4)
    row = tuple((i, i + 1, i + 2, i + 3) for i in range(0, 64, 4))
    assert seconds(ring, "all-to-all", row) == pytest.approx(B / 2 / V5P.link)


def test_messages_on_one_link_wait_for_each_other():
    where = a_slice(V5E, 4, 1)
    permute = "collective-permute"
    assert seconds(where, permute, ((0, 1), (1, 2), (2, 3))) == pytest.approx(B / V5E.link)
    assert seconds(where, permute, ((0, 3), (1, 2))) == pytest.approx(2 * B / V5E.link)
    around = a_slice(V5P, 4, 4, 4)
    assert seconds(around, permute, ((0, 48),)) == pytest.approx(B / V5P.link), (
        "the other way round"
    )


def test_two_devices_of_a_chip_share_its_links():
    where = a_slice(V7X, 2, 2, 1)
    everybody, alone = (tuple(range(8)),), ((0, 2, 4, 6), (1, 3, 5, 7))
    together = B * 3 / 4 / (2 * V7X.link)
    assert seconds(where, "all-gather", everybody) == pytest.approx(together)
    assert seconds(where, "all-gather", alone) == pytest.approx(2 * together)
    assert seconds(where, "all-gather", ((0, 1), (2, 3))) == B / (BESIDE * V7X.link)


def test_little_takes_as_long_as_its_way():
    where = a_slice(V5E, 4, 4)
    assert seconds(where, "all-gather", (tuple(range(16)),), 16) == 6 * HOP
    assert seconds(where, "collective-permute", ((0, 15),), 4) == 6 * HOP


def test_across_slices_the_hosts_network_bounds():
    where = a_slice(V5E, 4, 4)
    crossing = Collective("all-reduce", B, 3, (), "", slices=2)
    assert where.seconds(crossing) == pytest.approx(B / V5E.network)
