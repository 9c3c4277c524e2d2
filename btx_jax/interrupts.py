"""Handle Ctrl-C and SIGTERM: print one line and leave nothing behind, whatever the process was
doing.

KeyboardInterrupt is not used: raised in a callback of the garbage collector or in a finaliser,
Python drops it, and the program would continue.
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
    """From now on, let either signal end the process with status 128 + its number, as for any
    program ended by a signal. A signal that the caller had ignored (nohup) stays ignored."""

    def end(number: int, _: FrameType | None) -> None:
        threading.excepthook = lambda _: None  # silences threads whose files are removed below
        abandon()
        # Unbuffered: the signal may have interrupted a write to a buffer.
        os.write(2, f"\nbtx_jax: interrupted; {cure}\n".encode())
        os._exit(128 + number)  # library threads have nothing more to do

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextmanager
def noted(told: str) -> Iterator[Callable[[], int]]:
    """Context in which the first signal only makes the yielded function return the signal's number
    instead of 0; a second signal has the effect it had before. told: printed when the first signal
    arrives."""
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
