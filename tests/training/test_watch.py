import pytest

from btx_jax.training.watch import (
    BARRIER,
    DROPPED_STEPS,
    FIRST_STEPS,
    Basin,
    Dropped,
    FirstSteps,
)


def warnings(losses, heldout=None, resumed=()):
    """Step -> warning. heldout: domain -> (start, now), as if it were always evaluated so."""
    watch = FirstSteps(2e-3, resumed)
    said = {}
    for step, loss in enumerate(losses, start=len(resumed) + 1):
        if told := watch.add(step, loss, lambda: heldout or {}):
            said[step] = told
    return said


def test_a_start_that_ruins_what_was_learnt_is_told_once_with_cause_and_cure():
    said = warnings([2.44, 6.49, 6.3, 6.1, 6.0, 5.9], {"math": (2.4, 6.4), "code": (2.5, 6.2)})
    assert list(said) == [4], "three batches in a row, and once"
    assert "held-out loss has risen from 2.45 to 6.30" in said[4]
    assert "rate of 0.002" in said[4] and "lower config.train.learning_rate" in said[4]


def test_without_held_out_losses_the_batches_decide_if_they_rise_twice_as_far():
    assert list(warnings([2.44, 3.9, 4.1, 4.0])) == [4]
    assert warnings([2.44, 3.2, 3.1, 3.2]) == {}, "batches of another domain may differ so much"


@pytest.mark.parametrize(
    ("losses", "heldout"),
    [
        pytest.param([7.6 - step / 50 for step in range(120)], None, id="random weights"),
        pytest.param([2.4, 2.5, 3.6, 2.5, 2.6, 3.7, 3.4, 2.4] * 10, None, id="spikes of warm-up"),
        pytest.param([1.8, 5.1, 4.9, 5.2, 1.7, 5.0, 5.1, 4.8], {"a": (4.0, 3.9)}, id="batches of all kinds"),
        pytest.param([1.8, 2.9, 2.8, 2.9], {"own": (1.8, 1.7), "old": (3.0, 6.0)}, id="forgetting"),
        pytest.param([2.4] * FIRST_STEPS + [6.0] * 20, None, id="later trouble, of another cause"),
        pytest.param([9.0, 8.7, 8.2, 8.4, 7.9], {"new": (9.0, 8.0)}, id="a new domain"),
        pytest.param([2.4, 6.0], {"a": (2.4, 6.0)}, id="two steps, told by their held-out losses"),
    ],
)  # fmt: skip
def test_a_legitimate_start_is_left_in_peace(losses, heldout):
    assert warnings(losses, heldout) == {}


def test_held_out_losses_alone_tell_too():
    watch = FirstSteps(1.0)
    assert watch.compare(2, {"a": (2.0, 2.2), "b": (3.0, 9.0)}) == "", "one domain may be forgotten"
    assert "from 2.50 to 7.50" in watch.compare(2, {"a": (2.0, 6.0), "b": (3.0, 9.0)})
    assert watch.compare(3, {"a": (2.0, 6.0)}) == "", "once"
    assert FirstSteps(1.0).compare(FIRST_STEPS + 1, {"a": (2.0, 6.0)}) == ""


def test_a_resumed_run_remembers_where_it_began():
    assert list(warnings([6.3, 6.1], {"a": (2.4, 6.0)}, resumed=[2.44, 6.49])) == [4]


def test_held_out_losses_are_not_asked_for_at_every_step():
    asked = []
    watch = FirstSteps(1.0)
    for step, loss in enumerate([1.8] + [5.0] * 30, start=1):
        watch.add(step, loss, lambda: asked.append(1) or {"a": (4.0, 3.9)})
    assert len(asked) == 3


def test_dropped_claims_are_told_once_over_a_few_per_cent():
    watch = Dropped(100)
    said = [watch.add(0.2) for _ in range(30)]
    assert [i for i, told in enumerate(said, 1) if told] == [DROPPED_STEPS]
    assert "20% of the routed tokens" in said[DROPPED_STEPS - 1]
    assert "config.compute.dispatch='ragged'" in said[DROPPED_STEPS - 1]
    assert "capacity_factor" in said[DROPPED_STEPS - 1]
    few = Dropped(100)
    assert not any(few.add(0.04) for _ in range(30))
    short = Dropped(3)
    assert [bool(short.add(0.2)) for _ in range(3)] == [False, False, True], "a run of three steps"


@pytest.mark.parametrize(
    ("is_pretrained", "cure"),
    [
        (True, "lower config.train.learning_rate or freeze the shared parameters"),
        (False, "usual after little training of the seed; merge shared parameters with"),
    ],
)
def test_the_cure_of_a_high_barrier_suits_the_seed(is_pretrained, cure):
    basin = Basin(is_pretrained)
    assert basin.add(2, BARRIER) == ""
    told = basin.add(4, 0.25)
    assert told.startswith("step 4: mixing barrier 0.25 nats per token: this branch has left the")
    assert cure in told
    assert basin.add(6, 0.3) == "", "once"
