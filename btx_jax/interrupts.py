"""Ctrl-C and SIGTERM: one line, nothing left behind, whatever the process was doing.

Not by KeyboardInterrupt: where it is raised in a callback of the garbage collector or in a
finaliser, Python drops it, and the program continues as if nobody had asked.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from btx_jax.output import abandon

_Handler = Callable[[int, FrameType | None], None]


def end_at_once(cure: str) -> None:
    """From now on either signal ends the process with status 128 + its number, as for any program
    that it ends. A signal that the caller had ignored (nohup) stays ignored."""

    def end(number: int, _: FrameType | None) -> None:
        threading.excepthook = lambda _: None  # of those whose files are taken away now
        abandon()
        # No buffers: the signal may have come in the middle of a write to one of them.
        os.write(2, f"\nbtx_jax: interrupted; {cure}\n".encode())
        os._exit(128 + number)  # threads of libraries have nothing more to do

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextmanager
def noted(told: str) -> Iterator[Callable[[], int]]:
    """Inside the block the first signal ends nothing: the yielded function returns its number, or
    0. A second one does what it did before. told: is logged when the first arrives."""
    came: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)
        os.write(2, f"\nbtx_jax: {told}\n".encode())
        restore()

    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield lambda: came[0] if came else 0
    finally:
        restore()
