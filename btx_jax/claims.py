"""Claims: which process holds a directory of a bucket, where nothing can be locked.

A claim is an object of the directory, .claims/NUMBER, which its owner renews every few seconds. The
highest number holds. Who finds the highest to be dead creates the next one, which a bucket grants
to one of several only. A claim is dead when its process has ended, for one of the same machine, or
has not renewed it for long. An owner that has lost its directory, as its machine was cut off, ends
at once: two must not write there.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from btx_jax import buckets

FOLDER = ".claims"
RENEWED = 10.0  # seconds between two signs of life
LAPSED = 45.0  # seconds without one after which a claim is dead

log = logging.getLogger(__name__)


class _Claim(NamedTuple):
    """A claim as an object stores it. beat: counts its renewals."""

    number: int
    process: dict[str, Any]
    nonce: str
    beat: int

    def renewed(self) -> "_Claim":
        return self._replace(beat=self.beat + 1)


def _this_process() -> dict[str, Any]:
    """What identifies this process, on machines that have /proc."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        found["started"] = _started(os.getpid())
    return found


def _started(pid: int) -> str:
    """When a running process started, in ticks since boot. Raises OSError when there is none."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _has_ended(process: dict[str, Any]) -> bool | None:
    """Whether the claiming process has ended; None where that cannot be known, as it is on another
    machine."""
    here = _this_process()
    machine = ("host", "boot", "namespace")
    if "started" not in here or any(process.get(name) != here[name] for name in machine):
        return None
    try:
        return _started(process["pid"]) != process["started"]
    except OSError:
        return True


def _file(directory: Path, number: int) -> Path:
    return directory / FOLDER / f"{number:08}.json"


def _told(claim: _Claim) -> bytes:
    return json.dumps(claim._asdict()).encode()


def _highest(directory: Path) -> _Claim | None:
    """The highest claim; one that is given up meanwhile does not count."""
    for name in reversed(list(buckets.objects(directory / FOLDER))):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            return _Claim(**json.loads((directory / FOLDER / name).read_bytes()))
    return None


def _is_dead(directory: Path, claim: _Claim) -> bool:
    """Whether the claim is dead. Waits, if it must, for a sign of life."""
    if (ended := _has_ended(claim.process)) is not None:
        return ended
    log.warning(
        "%s is claimed by a process of %s; whether it lives shows within %.0f s",
        directory,
        claim.process.get("host"),
        LAPSED,
    )
    until = time.monotonic() + LAPSED
    while time.monotonic() < until:
        time.sleep(RENEWED / 4)
        now = _highest(directory)
        if now is None:
            return True
        if now != claim:
            return False
    return True


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold a directory of a bucket for this process while the block lasts. Raises BlockingIOError
    when another process holds it."""
    before = _highest(directory)
    if before is not None and not _is_dead(directory, before):
        raise BlockingIOError(f"{directory} is held by a process of {before.process.get('host')}")
    number = before.number + 1 if before else 1
    claim = _Claim(number, _this_process(), secrets.token_hex(8), 0)
    if not buckets.create(_file(directory, number), _told(claim)):
        raise BlockingIOError(f"{directory} has just been claimed by another process")
    if before is not None:
        buckets.remove(_file(directory, before.number))
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(directory, claim, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(Exception):  # whatever hindered the block hinders this
            buckets.remove(_file(directory, number))


def _renew(directory: Path, claim: _Claim, ended: threading.Event) -> None:
    while not ended.wait(RENEWED):
        try:
            now = _highest(directory)
            if now is not None and now.nonce == claim.nonce:
                claim = claim.renewed()
                _file(directory, claim.number).write_bytes(_told(claim))
                continue
        except Exception as error:  # the way to the bucket is cut; it may come back
            log.debug("%s: the claim was not renewed: %s", directory, error)
            continue
        if not ended.is_set():
            log.error(
                "%s: another process has taken this directory, as nothing was heard of this one for"
                " %.0f s; it ends, and what it has saved is kept",
                directory,
                LAPSED,
            )
            os._exit(1)
