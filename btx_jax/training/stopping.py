"""Decide when a run stops early and when it saves, with the same answer in all processes."""

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
    """Raised after a signal: the run saves its last complete step and ends."""


class Stop:
    """Checks whether a stop signal has arrived. All processes must check equally often and in the
    same order: between micro-batches, steps, and batches of held-out text. number: the signal's
    number; 0 until one arrives."""

    def __init__(self, came: Callable[[], int]) -> None:
        self._came = came
        self.number = 0

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        self.number = self.number or self._came()
        if self.number:
            raise Stopped


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Context in which SIGTERM and (in single-process runs) Ctrl-C are recorded instead of ending
    the run at once. With several processes, once any of them receives SIGTERM, JAX's preemption
    service stops all of them at the next check that none has passed yet."""
    if jax.process_count() > 1:
        places = itertools.count(1)
        reached = multihost_utils.reached_preemption_sync_point
        yield Stop(lambda: signal.SIGTERM * reached(next(places)))
        return
    with interrupts.noted(
        "saving the last complete step; press Ctrl-C again to quit immediately"
    ) as came:
        yield Stop(came)


class Cadence:
    """Schedules saves every `checkpoint.every` steps, and earlier where more than
    `checkpoint.every_minutes` would otherwise pass between saves."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._steps, self._seconds = config.every, 60 * config.every_minutes
        self.restart()

    def restart(self) -> None:
        """Reset the clock. Call before the first step and after every save."""
        self._saved = self._asked = time.monotonic()
        self._late: ArrayLike = False

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. All processes must call this after every step. They
        compare clocks without waiting: each step uses the answers exchanged after the previous
        one."""
        now = time.monotonic()
        if self._seconds:
            took, late = now - self._asked, self._late
            self._asked = now
            # The answer is used one step from now; waiting for the step after that would be late.
            self._late = any_of_all(now + 2 * took - self._saved > self._seconds)
            if bool(np.asarray(late)):
                return True
        return step % self._steps == 0
