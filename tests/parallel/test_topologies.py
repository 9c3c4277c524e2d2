"""Names of TPU slices."""

import pytest

from btx_jax.errors import UserError
from btx_jax.parallel.topologies import parse_grid


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("v5e:8x16", (8, 16)),
        ("v6e:2x2", (2, 2)),
        ("v5p:2x2x4", (2, 2, 4)),
        ("v5p:4x4x12", (4, 4, 12)),
        ("tpu7x:2x2x1", (2, 2, 1)),
    ],
)
def test_slices_that_are_offered(name, sides):
    assert parse_grid(name) == (name.partition(":")[0], sides)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e:2x2x2", "v5e slices have two dimensions: 1x1, 2x2,"),
        ("v6e:4x4x4", "v6e slices have two dimensions"),
        ("v6e:3x4", "v6e slices have two dimensions"),
        ("v6e:16x32", "v6e slices have two dimensions"),
        ("v5p:4x4", "v5p slices have three dimensions"),
        ("v5p:2x2x3", "v5p slices have three dimensions, of 1, 2 or 4 chips, or all multiples"),
        ("v5p:2x2x8", "three dimensions"),
        ("v4:0x2x2", "is not a TPU topology"),
        ("v7:2x2", "is not a TPU topology; for example v5p:2x2x4 or v5e:4x4 (kinds: v4, v5e, v5p,"),
    ],
)
def test_slices_that_are_not(name, told):
    with pytest.raises(UserError) as raised:
        parse_grid(name)
    assert told in str(raised.value)
