"""Claims: which process holds a directory in a bucket, where nothing can be locked.

A claim is an object in the directory, .claims/NUMBER, which its owner renews every few seconds. The
highest number holds the directory. A process that finds the highest claim dead creates the next
one, which the bucket grants to only one of several processes. A claim is dead when its process, on
the same machine, has ended, or when it has not been renewed for LAPSED seconds. An owner that has
lost its directory, because its machine was cut off, ends at once: two processes must not write
there.
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
RENEWED = 10.0  # seconds between renewals
LAPSED = 45.0  # seconds without renewal after which a claim is dead

log = logging.getLogger(__name__)


class _Claim(NamedTuple):
    """The contents of a claim object. beat: number of renewals."""

    number: int
    process: dict[str, Any]
    nonce: str
    beat: int

    def renewed(self) -> "_Claim":
        return self._replace(beat=self.beat + 1)


def _this_process() -> dict[str, Any]:
    """Values that identify this process, on machines with /proc."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        found["started"] = _started(os.getpid())
    return found


def _started(pid: int) -> str:
    """Start time of a running process, in ticks since boot. Raises OSError when there is none."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _has_ended(process: dict[str, Any]) -> bool | None:
    """Whether the claiming process has ended; None if unknown, as on another machine."""
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
    """The highest claim, ignoring any that is given up while it is being read."""
    for name in reversed(list(buckets.objects(directory / FOLDER))):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            return _Claim(**json.loads((directory / FOLDER / name).read_bytes()))
    return None


def _is_dead(directory: Path, claim: _Claim) -> bool:
    """Whether the claim is dead. Waits for a renewal if necessary."""
    if (ended := _has_ended(claim.process)) is not None:
        return ended
    log.warning(
        "%s is claimed by a process on %s; checking for up to %.0f s whether it is alive",
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
    """Hold a directory in a bucket while the block runs. Raises BlockingIOError when another
    process holds it."""
    before = _highest(directory)
    if before is not None and not _is_dead(directory, before):
        raise BlockingIOError(f"{directory} is held by a process on {before.process.get('host')}")
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
        with contextlib.suppress(Exception):  # may fail for the same reason as the block
            buckets.remove(_file(directory, number))


def _renew(directory: Path, claim: _Claim, ended: threading.Event) -> None:
    while not ended.wait(RENEWED):
        try:
            now = _highest(directory)
            if now is not None and now.nonce == claim.nonce:
                claim = claim.renewed()
                _file(directory, claim.number).write_bytes(_told(claim))
                continue
        except Exception as error:  # the connection is lost, and may come back
            log.debug("%s: the claim was not renewed: %s", directory, error)
            continue
        if not ended.is_set():
            log.error(
                "%s: another process has taken this directory, as this one did not renew its"
                " claim for %.0f s; exiting, saved checkpoints are kept",
                directory,
                LAPSED,
            )
            os._exit(1)
