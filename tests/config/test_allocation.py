import pytest

from btx_jax.config.allocation import SHAPES, experts_per_layer
from btx_jax.errors import UserError


def test_digits_cover_the_depth():
    assert experts_per_layer("2468", 32) == (2,) * 8 + (4,) * 8 + (6,) * 8 + (8,) * 8
    thirty = experts_per_layer("2468", 30)
    assert [thirty.count(n) for n in (2, 4, 6, 8)] == [8, 7, 8, 7], (
        "layer l gets digit floor(4 l / 30)"
    )
    assert experts_per_layer("5", 3) == (5, 5, 5)
    assert experts_per_layer("201", 3) == (2, 0, 1)
    assert experts_per_layer("2, 4,4", 3) == (2, 4, 4)
    assert experts_per_layer("12,3", 2) == (12, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_hold_exactly_their_total_in_the_papers_proportions(shape):
    assert experts_per_layer(f"{shape}:160", 32) == tuple(
        digit for digit in SHAPES[shape] for _ in range(8)
    )
    for layers, total in ((30, 150), (4, 20), (5, 23), (32, 128), (7, 41)):
        counts = experts_per_layer(f"{shape}:{total}", layers)
        assert sum(counts) == total
        assert min(counts) >= 1
        ideal = [SHAPES[shape][4 * layer // layers] for layer in range(layers)]
        assert all(
            abs(count - total * weight / sum(ideal)) < 1
            for count, weight in zip(counts, ideal, strict=True)
        )


@pytest.mark.parametrize(
    ("allocation", "layers", "told"),
    [
        ("2,4,6", 4, "3 numbers for 4 layers"),
        ("2468", 3, "4 digits for 3 layers"),
        ("trianlge:160", 32, "must be digits such as 2468"),
        ("triangle", 32, "such as triangle:160"),
        ("triangle:6", 8, "layer 0|layer 1|layer 6|too few"),
        ("triangle:20", 3, "needs at least 4"),
        ("2,-4", 2, "whole numbers"),
        ("0", 4, "every layer gets 0 experts; give at least one"),
        ("", 4, "must be digits"),
    ],
)
def test_what_does_not_fit_is_refused(allocation, layers, told):
    with pytest.raises(UserError, match=told):
        experts_per_layer(allocation, layers)
