import numpy as np
import pytest

from btx_jax.errors import UserError
from btx_jax.evaluation.continual import measures

# LoRA on biology, physics, chemistry, economics, earth science (MoLA's table of continual
# learning).
PAPER = [
    [92.19, 61.46, 55.46, 60.71, 52.31],
    [88.16, 89.58, 55.46, 72.62, 61.54],
    [85.14, 81.77, 93.28, 59.52, 58.46],
    [78.84, 78.13, 70.59, 73.81, 38.46],
    [84.13, 77.08, 87.39, 78.57, 66.15],
]


def test_the_papers_matrix_gives_the_papers_numbers():
    found = measures(PAPER)
    assert {name: round(value, 2) for name, value in found.items()} == {
        "overall_performance": 78.66, "performance_drop": -2.17, "backward_transfer": -5.42,
    }  # fmt: skip


def test_the_drop_is_two_nths_of_the_transfer():
    rng = np.random.default_rng(0)
    for tasks in (2, 3, 7):
        found = measures(rng.uniform(0, 100, (tasks, tasks)))
        assert found["performance_drop"] == pytest.approx(2 / tasks * found["backward_transfer"])


@pytest.mark.parametrize("scores", [[[1.0]], [[1.0, 2.0]], [1.0, 2.0]])
def test_what_is_no_square_is_refused(scores):
    with pytest.raises(UserError, match="square"):
        measures(scores)
