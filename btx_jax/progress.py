"""Progress of everything that takes longer than a few seconds: a bar on a terminal; otherwise, for
training only, a log line per minute. One process reports: the others pass shown=False."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS = 60  # seconds between log lines


def bar(things: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """tqdm's progress bar, with its options; hidden where stderr is not a terminal."""
    return tqdm(things, disable=None if shown else True, **options)


@contextlib.contextmanager
def clock(told: str, shown: bool = True) -> Iterator[None]:
    """Show `told` and the elapsed time, for a block whose progress cannot be measured."""
    with bar(desc=told, bar_format="{desc} [{elapsed}]", leave=False, shown=shown) as running:
        over = threading.Event()

        def tick() -> None:
            while not over.wait(1):
                running.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        if not running.disable:
            ticking.start()
        try:
            yield
        finally:
            over.set()
            if not running.disable:
                ticking.join()


class Steps:
    """Progress of long work in steps: a bar on a terminal, log lines elsewhere."""

    def __init__(self, name: str, done: int, total: int, shown: bool = True):
        self._name, self._done, self._total = name, done, total
        self._logs = shown and not sys.stderr.isatty()
        self._bar = bar(desc=name, initial=done, total=total, unit="step", shown=shown)
        self._began, self._told = (time.monotonic(), done), time.monotonic()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, values: Mapping[str, str]) -> None:
        """Count one more step. values: shown with it."""
        self._done += 1
        self._bar.set_postfix(values, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._logs and now - self._told >= SECONDS and self._done < self._total:
            start, before = self._began
            left = (now - start) / (self._done - before) * (self._total - self._done)
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            told = (self._name, self._done, self._total, shown, tqdm.format_interval(left))
            log.info("%s: step %d of %d, %s, %s left", *told)
            self._told = now
