"""The child of sandbox.py, a script in a bare interpreter: python -I -S sandboxed.py REQUEST.

It consists of three processes. The keeper sets up the walls, starts the two others, watches their
resource usage, and prints the verdict. The solver runs the program written by a model. The judge
runs the tests, which are never in the solver's memory: the solver answers the tests' calls, and
returns only data. A program can thus pass tests only by right answers, whatever it does to its own
process.
"""

import json
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NoReturn

if __name__ == "__main__":  # with -I the package is not on the path
    sys.path.insert(0, os.path.abspath(f"{__file__}/../../.."))

from btx_jax.evaluation import sandbox_walls as walls
from btx_jax.evaluation.sandbox_values import (
    Channel,
    Stays,
    decode,
    decode_exception,
    encode,
    encode_exception,
    mutate,
    read_exactly,
    told,
)

if __name__ == "__main__":
    del sys.path[0]

THREADS = 64  # more than the interpreter and OpenBLAS start; fewer than would harm the machine
_LOOK = 0.05  # seconds between checks of the solver's usage
_DESCRIPTORS = 3  # the first after stdin, stdout and stderr


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run the contents of stdin: the program preceded by its length, then the tests as JSON.
    Returns {"passed", "why"}, or {"refused": why} when a wall cannot be set up, or {"unsupported":
    why} when the tests cannot be run from outside the program."""
    walls.die_with_parent()
    (length,) = struct.unpack("!I", read_exactly(0, 4))
    program = read_exactly(0, length).decode("utf-8", "surrogatepass")
    home, paths = request["home"], walls.readable(request["packages"])
    on_disk = walls.NAME_SPACES not in request["walls"]
    processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    try:
        user = walls.other_user() if walls.OTHER_USER in request["walls"] else None
        if not on_disk:
            home = walls.enter_name_spaces(home, paths, request["disk"], request["files"])
        if user is not None:
            os.chown(home, user, user)
    except (walls.Refused, OSError) as error:
        return {"refused": str(error)}
    sys.path += request["packages"]
    os.chdir(home)
    os.environ.update(HOME=home, TMPDIR=home)

    def inside(descriptors: list[int]) -> None:
        """Set up the remaining walls, around a process that keeps only these descriptors."""
        _keep(descriptors)
        try:
            if user is not None:
                walls.become(user)
            walls.contain(home, paths, request["seconds"], request["memory"], request["file"])
        except (walls.Refused, OSError) as error:
            Channel(-1, len(descriptors) + _DESCRIPTORS - 1).send("refused", str(error))
            os._exit(1)

    asks, answers, verdicts = os.pipe(), os.pipe(), os.pipe()
    if (judge := os.fork()) == 0:
        tests = os.dup(0)
        inside([tests, answers[0], asks[1], verdicts[1]])
        _judge(*range(_DESCRIPTORS, _DESCRIPTORS + 4))
    if not on_disk:
        walls.unshare(walls.NEW_PIDS)
    if (solver := os.fork()) == 0:
        inside([asks[0], answers[1]])
        _solve(program, Channel(_DESCRIPTORS, _DESCRIPTORS + 1))
    for fd in (*asks, *answers, verdicts[1]):
        os.close(fd)
    excess = _watch(solver, verdicts[0], processes, home if on_disk else "", request)
    if excess:
        os.kill(solver, signal.SIGKILL)
        os.kill(judge, signal.SIGKILL)
    return _verdict(judge, solver, Channel(verdicts[0], -1), excess, request["seconds"])


def _keep(descriptors: list[int]) -> None:
    """Keep these descriptors open, numbered from 3, with /dev/null as stdin, stdout and stderr."""
    null = os.open("/dev/null", os.O_RDWR)
    high = [os.dup2(fd, 100 + i) for i, fd in enumerate(descriptors)]
    for fd in range(_DESCRIPTORS):
        os.dup2(null, fd)
    os.closerange(_DESCRIPTORS, 100)
    for i, fd in enumerate(high):
        os.dup2(fd, _DESCRIPTORS + i, inheritable=False)
    os.closerange(100, 100 + len(high))


def _watch(solver: int, verdict: int, processes: int, home: str, request: dict[str, Any]) -> str:
    """Wait for the verdict, or until the solver exceeds a limit, which is returned: wall time,
    threads or, on a disk without its own limit, files or bytes."""
    status = os.open(f"{solver}/status", os.O_RDONLY, dir_fd=processes)
    end = time.monotonic() + request["clock"]
    while not select.select([verdict], [], [], _LOOK)[0]:
        threads = os.pread(status, 1 << 13, 0).partition(b"Threads:\t")[2].partition(b"\n")[0]
        if int(threads or 0) > THREADS:
            return f"more than {THREADS} threads"
        if home and (excess := _too_much(home, request["disk"], request["files"])):
            return excess
        if time.monotonic() > end:
            return "timeout"
    return ""


def _too_much(home: str, size: int, files: int) -> str:
    """The limit on files or bytes that is exceeded, or "". Visits at most as many entries as are
    permitted. A program cannot hide files in a directory without access: see sandbox_walls."""
    folders, seen, taken = [home], 0, 0
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    seen += 1
                    taken += entry.stat(follow_symlinks=False).st_blocks * 512
                    if seen > files:
                        return f"more than {files} files"
                    if taken > size:
                        return f"more than {size} bytes of files"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed in the meantime
            continue
        except OSError as error:  # such as a path that is too long
            return f"files that cannot be counted: {error.strerror}"
    return ""


def _verdict(
    judge: int, solver: int, channel: Channel, excess: str, seconds: int
) -> dict[str, Any]:
    try:
        kind, why = channel.receive()
    except EOFError:  # the judge was killed
        kind, why = "failed", ""
    died = [_end(process, seconds, patience=0 if why else 1) for process in (solver, judge)]
    if kind in ("refused", "unsupported"):
        return {kind: why}
    if kind == "passed" and not excess:
        return {"passed": True, "why": ""}
    causes = (excess, why, *died, "ended before its tests did")
    return {"passed": False, "why": next(filter(None, causes))}


def _end(process: int, seconds: int, patience: float) -> str:
    """End a process, after giving it a moment to end by itself; returns what killed it."""
    until = time.monotonic() + patience
    while not (ended := os.wait4(process, os.WNOHANG))[0]:
        if time.monotonic() >= until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return ""
        time.sleep(0.005)
    _, status, usage = ended
    if not os.WIFSIGNALED(status):
        return ""
    killer = signal.Signals(os.WTERMSIG(status))
    spent = usage.ru_utime + usage.ru_stime
    timeout = killer == signal.SIGKILL and spent > seconds - 0.5
    return "timeout" if timeout else f"killed by {killer.name}"


def _solve(program: str, channel: Channel) -> NoReturn:
    """Run the program, then answer the judge's requests until there are no more."""
    channel.send("contained")
    names: dict[str, Any] = {"__name__": "__main__"}
    kept: list[Iterator[Any]] = []

    def keep(iterator: Iterator[Any]) -> int:
        kept.append(iterator)
        return len(kept) - 1

    def answer(kind: str, *asked: Any) -> tuple[Any, ...]:
        if kind == "echo":
            return ("gave", *asked)
        if kind == "next":
            try:
                return "gave", encode(next(kept[asked[0]]), keep)
            except StopIteration:
                return ("ended",)
        entry_point, *given = asked
        arguments, named = map(decode, given)
        result = eval(entry_point, names)(*arguments, **named)
        return "gave", encode(result, keep), encode(arguments), encode(named)

    try:
        exec(compile(program, "program.py", "exec"), names)
        channel.send("loaded")
    except BaseException as error:
        channel.send("raised", encode_exception(error))
        os._exit(0)
    while True:
        try:
            asked = channel.receive()
        except EOFError:
            os._exit(0)
        try:
            reply = answer(*asked)
        except Stays as error:
            reply = ("stays", str(error))
        except BaseException as error:
            reply = ("raised", encode_exception(error))
        channel.send(*reply)


def _judge(tests: int, reader: int, writer: int, verdict: int) -> NoReturn:
    """Run the tests and send `passed`, `failed`, `refused` or `unsupported`, with the reason."""

    def settle(kind: str, why: str = "") -> NoReturn:
        Channel(-1, verdict).send(kind, why)
        os._exit(0)  # not an exception, which tests might catch

    try:
        with os.fdopen(tests, "rb") as file:
            given = json.load(file)
        _run_tests(Channel(reader, writer), given, settle)
    except BaseException as error:  # tests may raise anything: they have failed
        settle("failed", told(error))
    settle("passed")


def _run_tests(
    channel: Channel, tests: dict[str, str] | None, settle: Callable[..., NoReturn]
) -> None:
    """Run the tests; returns when they pass."""
    turn = threading.Lock()  # tests may have threads
    entry_point = tests["entry_point"] if tests else ""

    def hear(*message: Any) -> list[Any]:
        with turn:
            try:
                if message:
                    channel.send(*message)
                return channel.receive()
            except EOFError:  # the solver has ended, or sent something else
                settle("failed")

    def ask(*message: Any) -> list[Any]:
        state, *reply = hear(*message)
        if state == "raised":
            raise decode_exception(*reply)
        if state == "stays":
            raise TypeError(f"the program returned {reply[0]}, which its tests cannot look at")
        return reply

    def iterate(number: int) -> Iterator[Any]:
        while reply := ask("next", number):
            yield decode(reply[0], iterate)

    def hand_back(iterator: Iterator[Any]) -> NoReturn:
        if getattr(iterator, "gi_code", None) is iterate.__code__:
            settle("failed", "TypeError: the program returned an iterator, which it is to be given")
        raise Stays(f"a {type(iterator).__name__}")

    def candidate(*arguments: Any, **named: Any) -> Any:
        try:
            sent = [encode(list(arguments), hand_back), encode(named, hand_back)]
        except Stays as error:
            settle("unsupported", f"they call the program with {error}, which is not data")
        reply = ask("call", entry_point, *sent)
        if len(reply) != 3:
            settle("failed")
        result, *left = reply
        if left != sent:
            for old, new in zip(arguments, decode(left[0]), strict=True):
                mutate(old, new)
            for name, new in decode(left[1]).items():
                mutate(named[name], new)
        return decode(result, iterate)

    walled, *why = hear()  # before the program starts
    if walled != "contained":
        settle("refused", *why)
    ask()  # the program has been loaded
    if tests is None:
        nonce = os.urandom(16).hex()
        if ask("echo", nonce) != [nonce]:
            settle("failed")
        return
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(_whole(tests["setup"]), names)
    names[entry_point] = candidate
    exec(compile(tests["test"], "tests.py", "exec"), names)
    names["check"](candidate)


def _whole(setup: str) -> CodeType:
    """The longest prefix of a prompt's lines that compiles without the program."""
    lines = setup.splitlines()
    while True:
        for body in ("", "\n    pass"):
            try:
                return compile("\n".join(lines) + body, "prompt.py", "exec")
            except SyntaxError:
                continue
        del lines[-1]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
