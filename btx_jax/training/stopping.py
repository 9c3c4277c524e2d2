"""When a run ends before its last step, and when it saves on the way; all processes alike."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from btx_jax import interrupts
from btx_jax.config.config import CheckpointConfig
from btx_jax.parallel.hosts import any_of_all


class Stopped(Exception):
    """A signal has come: the run is to save the last step that is whole, and end."""


class Stop:
    """Asked wherever a run can end, by all processes as often and in the same order: between two
    micro-batches, steps, and batches of held-out text. number: of the signal, 0 while none came."""

    def __init__(self, came: Callable[[], int]) -> None:
        self._came = came
        self.number = 0

    def check(self) -> None:
        """Raises Stopped."""
        self.number = self.number or self._came()
        if self.number:
            raise Stopped


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Within it SIGTERM and, in a run of one process, Ctrl-C end nothing at once. Where several
    processes are asked, JAX's preemption service agrees on the place: the next that none of them
    has passed, once any has got SIGTERM."""
    if jax.process_count() > 1:
        places = itertools.count(1)
        reached = multihost_utils.reached_preemption_sync_point
        yield Stop(lambda: signal.SIGTERM * reached(next(places)))
        return
    with interrupts.noted("saving the last whole step; once more to end at once") as came:
        yield Stop(came)


class Cadence:
    """Every how many steps, and before how many minutes have passed since the last save."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._steps, self._seconds = config.every, 60 * config.every_minutes
        self.restart()

    def restart(self) -> None:
        """Where steps begin, and behind a save."""
        self._saved = self._asked = time.monotonic()
        self._late: ArrayLike = False

    def is_due(self, step: int) -> bool:
        """Asked behind every step, by all processes. They tell each other's clocks without waiting:
        what they said behind the step before is heard now."""
        now = time.monotonic()
        if self._seconds:
            took, late = now - self._asked, self._late
            self._asked = now
            # Heard a step from now, and another one would end too late.
            self._late = any_of_all(now + 2 * took - self._saved > self._seconds)
            if bool(np.asarray(late)):
                return True
        return step % self._steps == 0
