"""Running code that a model wrote: a process of its own that can compute and nothing else (Linux,
x86-64 and AArch64).

The child (sandboxed.py) limits itself before it sees the program. The parent adds a wall-clock
limit and a directory of its own. Nothing of this needs privileges. Reading files is not prevented.
"""

import dataclasses
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path

from tqdm import tqdm

from btx_jax.errors import UserError
from btx_jax.evaluation.sandboxed import CONTAINED, NONCE
from btx_jax.output import temporary_directory


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds: of CPU, and one and a half times that by the clock. memory: bytes of address space.
    file: bytes of any file written."""

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """why: `` when it passed; else `timeout`, `killed by SIGNAL`, or the last line of what the
    program printed to stderr."""

    passed: bool
    why: str = ""


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Whether a Python program runs to its end without an exception. Raises UserError where this
    machine cannot contain it."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        here = f"{platform.system()} {platform.machine()}"
        raise UserError(
            f"code tasks need Linux on x86-64 or AArch64 to contain what they run; this is {here}"
        )
    nonce = secrets.token_hex(NONCE // 2)
    with (
        temporary_directory("btx_jax-sandbox-") as home,
        tempfile.TemporaryFile() as told,
    ):
        reader, writer = os.pipe()
        command = [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("sandboxed.py")),
            str(home),
            str(writer),
            *map(str, dataclasses.astuple(limits)),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, cwd=home, start_new_session=True, pass_fds=(writer,),
            env={"PATH": "/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home), "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            try:
                process.communicate(
                    f"{nonce}{program}".encode("utf-8", "surrogatepass"),
                    timeout=1.5 * limits.seconds,
                )
                said = answer.read(100).decode(errors="replace")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome(False, "timeout")
        told.seek(0)
        lines = told.read(1 << 16).decode(errors="replace").strip().splitlines()
        if not said.startswith(CONTAINED):
            raise UserError(
                "code tasks cannot be contained here:"
                f" {lines[-1] if lines else f'exit status {process.returncode}'}"
            )
        if said == CONTAINED + nonce and process.returncode == 0:
            return Outcome(True)
        if process.returncode < 0:
            cause = signal.Signals(-process.returncode).name
            return Outcome(False, "timeout" if cause == "SIGXCPU" else f"killed by {cause}")
        return Outcome(False, lines[-1] if lines else "ended before its tests did")


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
    show: bool = True,
) -> list[Outcome]:
    """run_program for each, several at a time (by default as many as there are cores)."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        outcomes = pool.map(lambda program: run_program(program, limits), programs)
        return list(
            tqdm(outcomes, total=len(programs), desc="sandbox", unit="program", disable=not show)
        )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k programs drawn from the samples passes: 1 - C(n - c, k) / C(n, k)
    (arXiv 2107.03374, equation 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: there are {samples} samples")
    return 1 - comb(samples - passed, k) / comb(samples, k)
