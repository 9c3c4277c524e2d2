import itertools
import os
import signal

import pytest

from btx_jax.config.config import CheckpointConfig
from btx_jax.training import stopping
from btx_jax.training.stopping import Cadence, Stop, Stopped, stop_signal


def due(cadence, seconds, clock):
    """The steps, taking this many seconds each, at which a save is due."""
    saved = []
    for step, took in enumerate(seconds, start=1):
        clock[0] += took
        if cadence.is_due(step):
            saved.append(step)
            cadence.restart()
    return saved


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_checkpoint_is_due_by_steps_and_before_the_minutes_have_passed(clock):
    assert due(Cadence(CheckpointConfig(every=4)), [600] * 9, clock) == [4, 8]
    both = Cadence(CheckpointConfig(every=500, every_minutes=15))
    saved = due(both, [95] * 40, clock)
    assert all(8 * 95 <= 95 * (b - a) <= 900 for a, b in itertools.pairwise([0, *saved])), saved
    assert due(Cadence(CheckpointConfig(every=500, every_minutes=15)), [1] * 1001, clock)[0] == 500


def test_steps_that_grow_longer_are_saved_more_often(clock):
    cadence = Cadence(CheckpointConfig(every=10**6, every_minutes=10))
    seconds = [1] * 100 + [100] * 30
    saved = due(cadence, seconds, clock)
    at = [0, *(sum(seconds[:step]) for step in saved)]
    assert len(saved) > 4
    assert max(b - a for a, b in itertools.pairwise(at)) <= 600


def test_a_stop_is_heard_once_and_stays():
    came = iter([0, 0, signal.SIGTERM])
    stop = Stop(lambda: next(came))
    stop.check()
    stop.check()
    for _ in range(2):  # not asked again
        with pytest.raises(Stopped):
            stop.check()
        assert stop.number == signal.SIGTERM


def test_a_signal_is_noted_within_and_not_behind():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check()
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
