"""Running code that a model wrote: a process of its own that can compute and nothing else (Linux,
x86-64 and AArch64).

What contains it is in sandbox_walls.py, what runs inside in sandboxed.py; this is the outside: it
starts them, holds the clock, takes the verdict, and removes what is left. Nothing of this needs
privileges. Name spaces are made here or, where that is forbidden, by bubblewrap if it is installed.
Without them Landlock and the filter of system calls are the walls: then the number and the bytes of
files are looked at twenty times a second instead of limited, as threads are everywhere, and of a
path that it guesses a program can find out whether it exists, its size and its date.

With UnitTests a program passes by right answers alone: they run in another process, which it cannot
reach. Without, "passed" is the program's own word that it came to its end.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import shutil
import signal
import site
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from typing import Any

from btx_jax.errors import UserError
from btx_jax.evaluation.sandbox_walls import NAME_SPACES, OTHER_USER, readable
from btx_jax.output import locked
from btx_jax.progress import bar

log = logging.getLogger(__name__)
BUBBLEWRAP = "bubblewrap"  # may make name spaces where this process may not
_PATIENCE = 30  # seconds for what holds the clock to start and to end by itself
_PREFIX = "btx_jax-sandbox-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PYTHON = os.path.realpath(sys.executable)  # of a virtual environment: sandboxed.py needs no more
_SCRIPT = Path(__file__).with_name("sandboxed.py")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. seconds: CPU time, and one and a half times that in wall time.
    memory: bytes of address space. file: bytes of any file written. disk: bytes of all files
    together. files: how many."""

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 20
    disk: int = 1 << 24
    files: int = 1000


@dataclasses.dataclass(frozen=True)
class UnitTests:
    """Tests of a program: code that defines check(candidate), and the expression that names the
    candidate among what the program defines. setup is code in front of the program whose names the
    tests may use, a prompt. Arguments and results are plain data: see sandbox_values.py."""

    test: str
    entry_point: str
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """why: `` when the program passed; otherwise `timeout`, `killed by SIGNAL`, `more than ...`, or
    the exception on one line."""

    passed: bool
    why: str = ""


def run_program(program: str, limits: Limits = Limits(), tests: UnitTests | None = None) -> Outcome:
    """Run a Python program and report whether it passes its tests or, without any, ends without an
    exception. Raises UserError where this machine cannot contain it, and for tests that call the
    program with values that are not plain data."""
    found = _run(program, limits, tests, _walls())
    for state, told in (
        ("refused", "code tasks cannot be contained here"),
        ("unsupported", "a code task's tests do not work from outside the program"),
    ):
        if state in found:
            raise UserError(f"{told}: {found[state]}")
    return Outcome(**found)


@functools.cache
def _walls() -> tuple[str, ...]:
    """The strongest set of walls that this machine allows: those with which an interpreter still
    runs."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        here = f"{platform.system()} {platform.machine()}"
        raise UserError(
            f"code tasks need Linux on x86-64 or AArch64 to contain what they run; this is {here}"
        )
    _remove_left_overs()
    is_root = os.geteuid() == 0
    candidates: dict[tuple[str, ...], bool] = {
        (NAME_SPACES, OTHER_USER): is_root,
        (NAME_SPACES,): True,
        (BUBBLEWRAP,): shutil.which("bwrap") is not None,
        (OTHER_USER,): is_root,
        (): True,
    }
    found: dict[str, Any] = {}
    for walls in (walls for walls, possible in candidates.items() if possible):
        found = _run("import decimal, random", Limits(), None, walls)
        if found.get("passed"):
            if walls in ((OTHER_USER,), ()):
                log.warning(
                    "code tasks: no name spaces can be had here; files and threads of what runs are"
                    " watched, not limited"
                )
            return walls
    raise UserError(
        f"code tasks cannot be contained here: {found.get('refused') or found.get('why')}"
    )


def _run(
    program: str, limits: Limits, tests: UnitTests | None, walls: tuple[str, ...]
) -> dict[str, Any]:
    """The verdict of sandboxed.py, or a timeout."""
    home = tempfile.mkdtemp(prefix=_PREFIX)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_tree, home)
        stack.enter_context(locked(Path(home)))
        request = {"home": home, "walls": walls, **dataclasses.asdict(limits)}
        request["clock"] = clock = 1.5 * limits.seconds
        request["packages"] = site.getsitepackages()  # without what .pth files add and start
        outer = _bubblewrap(home, limits, request["packages"]) if BUBBLEWRAP in walls else []
        process = subprocess.Popen(
            [*outer, _PYTHON, "-I", "-S", _SCRIPT, json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        source = program.encode("utf-8", "surrogatepass")
        asked = json.dumps(tests and dataclasses.asdict(tests)).encode()
        try:
            said, complaint = process.communicate(
                struct.pack("!I", len(source)) + source + asked, timeout=clock + _PATIENCE
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "why": "timeout"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            return {"refused": last[0] if last else f"exit status {process.returncode}"}
        return json.loads(said)


def _remove_left_overs() -> None:
    """Delete directories of evaluations that were killed; those of running ones are locked, or
    about to be."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), locked(folder):
            if time.time() - folder.stat().st_ctime > 60:
                remove_tree(str(folder))


def _bubblewrap(home: str, limits: Limits, packages: list[str]) -> list[str]:
    """The command that goes before sandboxed.py's: namespaces, and a home in memory."""
    program, package = shutil.which("bwrap"), _SCRIPT.parent
    assert program
    code = [package.parent / "__init__.py", package]
    shown = [*readable(packages), _PYTHON, *map(str, code)]
    return [
        program, "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev-bind", "/dev/null",
        "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom",
        *(part for path in shown for part in ("--ro-bind", path, path)),
        "--size", str(limits.disk), "--tmpfs", home, "--chdir", home,
    ]  # fmt: skip


def remove_tree(path: str) -> None:
    """Delete a directory whatever a program has made of it: any depth, locked directories, names
    that are not UTF-8. Links are deleted, never followed. Paths do not grow, and at most two
    directories are open; nothing else may be working in it any more."""
    _unlock(path)
    here = os.open(path, _FOLDER)
    try:
        names: list[str] = []  # from path to here
        left = [_remove_files(here)]  # folders that are still there, at each of these
        while left:
            if left[-1]:
                names.append(left[-1].pop())
                _unlock(names[-1], here)
                below = os.open(names[-1], _FOLDER, dir_fd=here)
                os.close(here)
                here = below
                left.append(_remove_files(here))
            else:
                left.pop()
                if names:
                    above = os.open("..", _FOLDER, dir_fd=here)
                    os.close(here)
                    here = above
                    os.rmdir(names.pop(), dir_fd=here)
    finally:
        os.close(here)
    os.rmdir(path)


def _remove_files(folder: int) -> list[str]:
    """Delete what is not a directory, and return the directories."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def _unlock(name: str, parent: int | None = None) -> None:
    """Give the owner access to a directory, by a descriptor: a path may have become a
    link by now."""
    fd = os.open(name, os.O_PATH | _FOLDER, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
    show: bool = True,
    tests: Sequence[UnitTests] | None = None,
) -> list[Outcome]:
    """run_program for each, several at a time (by default as many as there are cores)."""
    judged: Sequence[UnitTests | None] = tests or [None] * len(programs)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        outcomes = pool.map(
            lambda pair: run_program(pair[0], limits, pair[1]), zip(programs, judged, strict=True)
        )
        return list(bar(outcomes, total=len(programs), desc="sandbox", unit="program", shown=show))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k programs drawn from the samples passes: 1 - C(n - c, k) / C(n, k)
    (arXiv 2107.03374, equation 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: there are {samples} samples")
    return 1 - comb(samples - passed, k) / comb(samples, k)
