import numpy as np
import pytest

from btx_jax.planning.expected import Arm, Curves, Spent, Study, curves, study, without
from tools import curves as written

REACH, DENSE, MIXTURE, APART = 0.5, 0.03, 0.05, 0.2
ARMS = [Spent(1000.0 * n) for n in (1, 2, 4)] + [
    Spent(4000 * share, 4000 * (1 - share)) for share in (0, 0.25, 0.5, 0.75)
]


def true_gain(spent):
    x = (spent.dense + spent.mixture) / 1000
    scale = MIXTURE * (1 - APART * spent.apart**2) if spent.mixture else DENSE
    return scale * np.log1p(x / REACH)


def made(noise=0.0):
    rng = np.random.default_rng(0)
    arms = [
        Arm(str(number), spent, tuple(true_gain(spent) + noise * rng.normal(size=3)))
        for number, spent in enumerate(ARMS)
    ]
    return Study(1000, 20_000, tuple(arms))


def test_known_curves_are_found():
    fitted = Curves(made())
    for spent in (Spent(3000), Spent(0, 3000), Spent(1500, 1500)):
        found = fitted.expected(spent, 1000)
        assert found.change == pytest.approx(-true_gain(spent), rel=1e-4)
        assert found.low <= found.change <= found.high
    assert fitted.expected(Spent(0), 1000).change == 0


def test_intervals_widen_with_the_spread_of_what_was_measured():
    narrow, wide = (Curves(made(noise)).expected(Spent(3000), 1000) for noise in (1e-4, 1e-3))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_nine_in_ten_new_measurements_lie_in_their_interval():
    noise = 1e-3
    rng, inside = np.random.default_rng(1), []
    for _ in range(40):
        arms = [Arm(a.name, a.spent, tuple(rng.normal(a.gains, noise))) for a in made().arms]
        expected = Curves(Study(1000, 20_000, tuple(arms))).expected(Spent(2000, 1000), 1000)
        new = -true_gain(Spent(2000, 1000)) + noise * rng.normal(size=10)
        inside += list((expected.low <= new) & (new <= expected.high))
    assert 0.9 < np.mean(inside) < 0.99


def test_what_lies_outside_is_said():
    fitted = Curves(made())
    assert fitted.expected(Spent(3000 * 7), 7000, 10_000).beyond == (
        "your model has 7k parameters, the study's has 1k",
        "your seed is trained on 1.4 tokens per parameter, the study's 20",
    )
    assert fitted.expected(Spent(500), 1000).beyond == (
        "dense training takes the FLOPs of 0.5 tokens per parameter, in the study 1 to 4",
    )
    assert not fitted.expected(Spent(3000), 2000, 30_000).beyond


@pytest.mark.parametrize("arm", study().arms, ids=lambda arm: arm.name)
def test_an_arm_that_was_held_out_lies_in_its_interval(arm):
    measured = study()
    fitted = Curves(without(measured, [arm.name]))
    expected = fitted.expected(arm.spent, measured.parameters, measured.seed_tokens)
    assert expected.low <= -np.mean(arm.gains) <= expected.high


def test_the_curves_fit_the_study():
    """The spread around them, a share of the loss, beside some 0.1 that are gained."""
    assert curves().variance ** 0.5 < 0.003


def test_what_arms_spend_is_read_from_the_study_itself():
    seeds = [{name: {"nats_per_token": {"a": 2.0}} for name in ("seed", "btx")}]
    arms = {arm["name"]: arm for arm in written.made(seeds)["arms"]}
    assert arms["btx"]["dense"] == 3 * 500 * 2048 and arms["btx"]["gains"] == [0.0]
    assert arms["dense"]["mixture"] == arms["upcycling_flops"]["dense"] == 0
    flops = [arms[n]["dense"] + arms[n]["mixture"] for n in ("btx", "share_25", "upcycling_flops")]
    assert max(flops) / min(flops) < 1.001
