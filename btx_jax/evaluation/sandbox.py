"""Run code written by a model in a process that can only compute (Linux, x86-64 and AArch64).

sandbox_walls.py sets up the containment, and sandboxed.py is what runs inside it. This module is
the outside: it starts them, enforces the time limit, receives the verdict, and cleans up. No
privileges are needed. Namespaces are created here or, where that is forbidden, by bubblewrap if it
is installed. Without namespaces, containment relies on Landlock and the system-call filter: the
number and size of files are then checked twenty times a second instead of limited, as threads
always are, and a program can find out the existence, size and date of a path that it guesses.

With UnitTests, a program can pass only with right answers: the tests run in another process, which
it cannot reach. Without them, "passed" means only that the program reports that it reached its end.
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
BUBBLEWRAP = "bubblewrap"  # may create namespaces where this process may not
_PATIENCE = 30  # seconds for the process that enforces the time limit to start and to end by itself
_PREFIX = "btx_jax-sandbox-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PYTHON = os.path.realpath(sys.executable)  # not a virtual environment's: no packages needed
_SCRIPT = Path(__file__).with_name("sandboxed.py")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resource limits of a program. seconds: CPU time; wall time is one and a half times as much.
    memory: bytes of address space. file: bytes of any one file written. disk: bytes of all files.
    files: their number."""

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 20
    disk: int = 1 << 24
    files: int = 1000


@dataclasses.dataclass(frozen=True)
class UnitTests:
    """Tests of a program: code that defines check(candidate), and the expression that names the
    candidate in the program. setup: code before the program, such as a prompt, whose names the
    tests may use. Arguments and results are plain data: see sandbox_values.py."""

    test: str
    entry_point: str
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a program. why: "" when it passed; otherwise `timeout`, `killed by SIGNAL`,
    `more than ...`, or the exception on one line."""

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
    """The strongest set of walls that this machine supports, such that an interpreter still
    runs."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        here = f"{platform.system()} {platform.machine()}"
        raise UserError(
            "code tasks need Linux on x86-64 or AArch64 to contain the code that they run;"
            f" this is {here}"
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
                    "code tasks: namespaces are not available here; files and threads of the"
                    " programs are monitored, not limited"
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
    """Delete directories of killed evaluations; those of running ones are locked, or about to
    be."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), locked(folder):
            if time.time() - folder.stat().st_ctime > 60:
                remove_tree(str(folder))


def _bubblewrap(home: str, limits: Limits, packages: list[str]) -> list[str]:
    """The command prefix for sandboxed.py: namespaces, and a home in memory."""
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
    directories are open at a time; no other process may still be using it."""
    _unlock(path)
    here = os.open(path, _FOLDER)
    try:
        names: list[str] = []  # from path to the current directory
        left = [_remove_files(here)]  # for each of these, its remaining directories
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
    """Delete everything but directories, which are returned."""
    folders = []
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def _unlock(name: str, parent: int | None = None) -> None:
    """Give the owner access to a directory, through a descriptor, as the path may have become a
    link."""
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
    """Call run_program for each program, several at a time (by default one per core)."""
    judged: Sequence[UnitTests | None] = tests or [None] * len(programs)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        outcomes = pool.map(
            lambda pair: run_program(pair[0], limits, pair[1]), zip(programs, judged, strict=True)
        )
        return list(bar(outcomes, total=len(programs), desc="sandbox", unit="program", shown=show))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k programs drawn from the samples passes: 1 - C(n - c, k) / C(n, k)
    (arXiv 2107.03374, equation 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: there are {samples} samples")
    return 1 - comb(samples - passed, k) / comb(samples, k)
