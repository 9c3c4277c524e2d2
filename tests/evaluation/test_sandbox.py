"""Models' programs run in the sandbox, and nothing escapes: sandbox_attacks.py has the attacks and
the forged verdicts."""

import gzip
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from btx_jax.errors import UserError
from btx_jax.evaluation import sandbox, sandbox_walls
from btx_jax.evaluation.sandbox import (
    Limits,
    UnitTests,
    pass_at_k,
    remove_tree,
    run_program,
    run_programs,
)
from btx_jax.evaluation.sandbox_values import Stays, decode, encode
from btx_jax.output import locked
from tests.evaluation.sandbox_attacks import ATTACKS, FORGERIES

SQUARE = UnitTests("def check(candidate):\n    assert candidate(3) == 9", "square")


USERS = ["as_is", "nobody"] if os.geteuid() == 0 else ["as_is"]


@pytest.mark.parametrize("extent", ["all", "fewest"])
@pytest.mark.parametrize("user", USERS)
def test_every_attack_fails_and_changes_nothing_outside(user, extent):
    script = Path(__file__).with_name("sandbox_attacks.py")
    ran = subprocess.run(
        [sys.executable, str(script), user, extent], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    after = json.loads(ran.stdout)
    assert after["passed"] == []
    assert [name for name in (*ATTACKS, *FORGERIES) if not after["why"][name]] == []
    assert after["user"] == (65534 if user == "nobody" else os.geteuid())
    assert after["changed"] == []
    assert after["left"] == [], "folders of the sandbox lie about"
    assert after["running"] == 0, "processes of the sandbox are still there"


def test_every_wall_that_this_machine_has_is_used():
    wanted = [sandbox.OTHER_USER] if os.geteuid() == 0 else []
    try:
        flag = "-m" if os.geteuid() == 0 else "-rm"
        subprocess.run(["unshare", flag, "true"], check=True, capture_output=True)
        wanted.append(sandbox.NAME_SPACES)
    except (OSError, subprocess.CalledProcessError):
        assert sandbox.NAME_SPACES not in sandbox._walls()
    else:
        assert sandbox.NAME_SPACES in sandbox._walls()
        assert set(sandbox._walls()) == set(wanted)


def test_a_machine_that_cannot_contain_is_refused(monkeypatch):
    def no_landlock(*_):
        return {"refused": "Landlock (Linux 5.13 or newer, enabled): Function not implemented"}

    sandbox._walls.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(sandbox, "_run", no_landlock)
            with pytest.raises(UserError, match=r"cannot be contained here: Landlock .*5\.13"):
                run_program("x = 1")
        with monkeypatch.context() as patched:
            patched.setattr(sandbox.platform, "machine", lambda: "riscv64")
            with pytest.raises(UserError, match=r"need Linux on x86-64 or AArch64.*riscv64"):
                run_program("x = 1")
    finally:
        sandbox._walls.cache_clear()


@pytest.mark.parametrize(
    ("had", "installed", "chosen", "warns"),
    [
        ({sandbox.NAME_SPACES}, True, (sandbox.NAME_SPACES,), False),
        ({sandbox.BUBBLEWRAP}, True, (sandbox.BUBBLEWRAP,), False),
        ({sandbox.BUBBLEWRAP}, False, (), True),
        (set(), True, (), True),
    ],
)
def test_the_best_walls_that_can_be_had_are_chosen(
    had, installed, chosen, warns, monkeypatch, caplog
):
    def run(program, limits, tests, walls):
        return {"passed": True} if set(walls) <= had else {"refused": "not permitted"}

    monkeypatch.setattr(sandbox, "_run", run)
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: "/usr/bin/bwrap" if installed else None)
    sandbox._walls.cache_clear()
    try:
        assert sandbox._walls() == chosen
    finally:
        sandbox._walls.cache_clear()
    assert ("namespaces are not available" in caplog.text) == warns


def test_bubblewrap_shows_the_interpreter_and_nothing_of_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: "/usr/bin/bwrap")
    command = sandbox._bubblewrap(str(tmp_path), Limits(), [])
    shown = [command[i + 1] for i, word in enumerate(command) if word == "--ro-bind"]
    assert "--unshare-all" in command and "--die-with-parent" in command
    assert os.path.realpath(sys.executable) in shown
    for private in (str(Path.home()), "/", "/etc", "/home", "/root", "/tmp", os.getcwd()):
        assert private not in shown


def test_the_reason_is_told(monkeypatch):
    assert run_program("raise ValueError('seven')").why == "ValueError: seven"
    assert run_program("while True: pass", Limits(seconds=1)).why == "timeout"
    assert "MemoryError" in run_program("x = bytearray(2 << 30)").why
    assert "Operation not permitted" in run_program("import socket\nsocket.socket()").why
    assert run_program("import os\nos.abort()").why.startswith("killed by SIG")
    sleeping = UnitTests("import time\ndef check(candidate): time.sleep(60)", "f")
    assert run_program("f = 1", Limits(seconds=1), sleeping).why == "timeout"
    many = "for i in range(9): open(f'{i}', 'w').close()\nimport time\ntime.sleep(1)"
    if sandbox.NAME_SPACES in sandbox._walls():
        assert "No space left" in run_program(many, Limits(files=5)).why
    monkeypatch.setattr(sandbox, "_walls", lambda: ())
    assert run_program(many, Limits(files=5)).why == "more than 5 files"
    large = "open('x', 'wb').write(bytes(1 << 20))\nimport time\ntime.sleep(1)"
    assert run_program(large, Limits(disk=1 << 19)).why == "more than 524288 bytes of files"


def test_honest_programs_pass():
    programs = [
        "print('x' * 10)\nassert sum(range(10)) == 45",
        "open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'",
        "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()",
        "import math, random, collections, re, hashlib\nassert math.gcd(4, 6) == 2",
        "import os\nos.makedirs('a/b')\nos.rename('a/b', 'c')\nassert {*os.listdir()} == {*'ac'}",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x'); f.truncate(0)",
        "import numpy as np\nassert np.linalg.inv(np.eye(8)).trace() == 8",
        "from concurrent.futures import ThreadPoolExecutor as T\nassert list(T(8).map(abs, [-1])) == [1]",
        "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(1)\nsignal.pause()",
        "import datetime, zoneinfo, uuid, secrets, decimal, fractions, statistics, json, sqlite3, ctypes",
        "import os, time, resource\nos.urandom(8), time.time(), os.cpu_count(), resource.getrlimit(0)",
    ]  # fmt: skip
    outcomes = run_programs(programs, show=False)
    assert [outcome.passed for outcome in outcomes] == [True] * len(programs), outcomes


RIGHT = {
    "plain": ("def f(x): return x + 1", "assert candidate(1) == 2"),
    "changes its argument": (
        "def f(x, y): x.sort(); y['a'] = 1",
        "x, y = [3, 1], {}\ncandidate(x, y=y)\nassert x == [1, 3] and y == {'a': 1}",
    ),
    "generator": (
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "import itertools\nassert list(itertools.islice(candidate(), 3)) == [0, 1, 2]",
    ),
    "exception": (
        "def f(x): raise ValueError('no')",
        "try:\n    candidate(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    raise AssertionError",
    ),
    "NumPy": (
        "import numpy as np\ndef f(x): return x * np.float32(2)",
        "import numpy as np\nr = candidate(np.arange(3, dtype='f4'))\n"
        "assert r.dtype == 'f4' and r.tolist() == [0, 2, 4]",
    ),
    "by its name": ("def f(x): return 2 * x", "assert f(f(1)) == 4"),
    "helpers of the prompt": ("def g(x): return 0\ndef f(x): return 10", "assert g(1) == f(1)"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass_from_outside(name):
    program, test = RIGHT[name]
    check = "def check(candidate):\n    " + test.replace("\n", "\n    ")
    prompt = "from math import pi\ndef g(x):\n    return 10\ndef f(x):\n"
    assert run_program(program, tests=UnitTests(check, "f", prompt)).why == ""


def test_an_entry_point_may_be_a_method():
    program = "class Solution:\n    def square(self, x): return x * x"
    assert run_program(program, tests=UnitTests(SQUARE.test, "Solution().square")).passed


def test_a_program_that_ends_in_a_call_fails_whatever_the_tests_catch():
    test = "def check(candidate):\n    try: candidate(1)\n    except BaseException: pass"
    outcome = run_program("import os\ndef f(x): os._exit(0)", tests=UnitTests(test, "f"))
    assert outcome == sandbox.Outcome(False, "ended before its tests did")


def test_tests_that_cannot_be_asked_from_outside_are_an_error_not_a_failure():
    test = "def check(candidate):\n    assert candidate(lambda x: x) == 1"
    with pytest.raises(UserError, match="they call the program with a function, which is not data"):
        run_program("def f(g): return 1", tests=UnitTests(test, "f"))
    test = "def check(candidate):\n    assert candidate(1)(1) == 1"
    outcome = run_program("def f(x): return lambda y: y", tests=UnitTests(test, "f"))
    assert (
        outcome.why == "TypeError: the program returned a function, which its tests cannot look at"
    )


def test_a_program_cannot_make_its_tests_an_error():
    test = "def check(candidate):\n    assert candidate(candidate(1)) == 1"
    outcome = run_program("def f(x): yield x", tests=UnitTests(test, "f"))
    assert outcome.why == "TypeError: the program returned an iterator, which it is to be given"
    test = "def check(candidate):\n    assert candidate(iter([1])) == 1"
    with pytest.raises(UserError, match="with a list_iterator, which is not data"):
        run_program("def f(x): return 1", tests=UnitTests(test, "f"))


def test_values_arrive_as_they_left():
    import collections
    import datetime
    import decimal
    import enum
    import fractions

    import numpy as np

    values = [
        None, True, 0, -(1 << 20000), 0.1, float("inf"), -0.0, "é\ud800\0", b"\xff", bytearray(b"x"),
        1 + 2j, [1, [2]], (1, (2,)), {1, (2, 3)}, frozenset({1}), {(1, 2): {"a": [None]}}, range(3, 9, 2),
        collections.deque([1]), collections.Counter("aab"), collections.OrderedDict(a=1),
        decimal.Decimal("1.10"), fractions.Fraction(1, 3), datetime.datetime(2024, 2, 29, 1),
        datetime.date(2024, 2, 29), datetime.time(1, 2, 3, 4), datetime.timedelta(1, 2, 3),
        {1: 2}.keys(), {1: 2}.items(), np.float64(0.1), np.bool_(True), np.int8(-3),
    ]  # fmt: skip
    for value in values:
        found = decode(json.loads(json.dumps(encode(value))))
        assert type(found) is type(value)
        assert found == value if isinstance(value, int) else repr(found) == repr(value)
    array = np.arange(6, dtype=">i2").reshape(2, 3).T
    found = decode(json.loads(json.dumps(encode(array))))
    assert found.dtype == array.dtype and (found == array).all()

    class Forged(int):
        def __eq__(self, other):
            return True

    Point = collections.namedtuple("Point", "x y")
    colour = enum.IntEnum("Colour", "RED")
    for value, plain in ((Forged(3), 3), (Point(1, 2), (1, 2)), (colour.RED, 1)):
        found = decode(encode(value))
        assert type(found) is type(plain) and found == plain
    for value in (object(), print, int, np.array([object()]), [print]):
        with pytest.raises(Stays):
            encode(value)


def kernel(code, arch, number, arguments):
    """A classic BPF machine like the kernel's: returns the verdict on a system call."""
    data = {0: number, 4: arch}
    for i, argument in enumerate(arguments):
        data[16 + 8 * i] = argument & 0xFFFFFFFF
    at, a = 0, 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            a = data.get(k, 0)
        elif operation == 0x54:
            a &= k
        else:
            holds = {0x15: a == k, 0x45: bool(a & k), 0x35: a >= k}[operation]
            at += yes if holds else no


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_what_the_filter_allows(machine, arch):
    column = ("x86_64", "aarch64").index(machine)
    code = sandbox_walls.system_calls(machine, 77)
    assert len(code) < 4096 and max(max(step[1:3]) for step in code) < 256

    def asked(number, *arguments):
        return kernel(code, arch, number, arguments)

    allow, refuse = sandbox_walls.ALLOW, sandbox_walls.REFUSE
    allowed = {numbers[column] for numbers in sandbox_walls.ALLOWED.values()}
    # Calls decided by one argument, in a form that must fail
    numbers = {
        "open": (2, 56)[column], "fcntl": (72, 25)[column], "ioctl": (16, 29)[column], "clone": (56, 220)[column],
        "kill": (62, 129)[column], "tgkill": (234, 131)[column], "prlimit": (302, 261)[column],
    }  # fmt: skip
    for number in range(600):
        some = asked(number, 0, 0, 0, 0, 0, 0)
        if number in allowed:
            assert some == allow, number
        elif number in (435, 437):
            assert some == sandbox_walls.MISSING
        elif number not in (*numbers.values(), 257, 83, 258, 34):
            assert some == refuse, number
    path = 2 if machine == "aarch64" else 1
    opened = lambda flags: asked(numbers["open"], *[0] * path, flags)  # noqa: E731
    assert [opened(flags) for flags in (0, 0x241, 0x242)] == [allow] * 3
    assert [opened(flags) for flags in (0x200, 0x203)] == [refuse] * 2
    assert [asked(numbers["fcntl"], 3, c, 0x800) for c in (0, 1, 2, 3, 4, 1030)] == [allow] * 6
    owner_signal_lease_lock_notify_seals = (5, 6, 7, 8, 10, 15, 1024, 1026, 1031, 1033, 36, 37)
    assert {asked(numbers["fcntl"], 3, c) for c in owner_signal_lease_lock_notify_seals} == {refuse}
    assert asked(numbers["fcntl"], 3, 4, 0x2000) == refuse
    assert [asked(numbers["ioctl"], 3, c) for c in (0x5401, 0x5452, 0x8901, 0x5412)] == [
        allow,
        *[refuse] * 3,
    ]
    thread = 0x3D0F00
    flags = (thread, 17, thread | 0x10000000, thread | 0x80, 0x4111)
    assert [asked(numbers["clone"], f) for f in flags] == [allow, *[refuse] * 4]
    for name in ("kill", "tgkill"):
        assert [asked(numbers[name], p) for p in (77, 1, 0, -1)] == [allow, *[refuse] * 3]
    assert [asked(numbers["prlimit"], p) for p in (0, 77, 1)] == [allow, allow, refuse]
    mkdirat = (258, 34)[column]
    assert [asked(mkdirat, 0, 0, m) for m in (0o777, 0o700, 0o600, 0)] == [
        allow,
        allow,
        refuse,
        refuse,
    ]
    assert kernel(code, arch ^ 1, 0, ()) == sandbox_walls.KILL
    if machine == "x86_64":
        assert asked(0x40000000) == sandbox_walls.KILL


OLD_LANDLOCK = """
import os, sys
from btx_jax.evaluation import sandbox_walls as walls
walls._HANDLED = {1: 0x1FFF}  # truncating is not among what Linux 5.13 can forbid
home, victim = sys.argv[1:]
walls.contain(home, [os.path.dirname(victim)], 10, 1 << 30, 1 << 20)
assert open(victim).read() == "whole"
for attempt in (
    lambda: os.truncate(victim, 0),
    lambda: os.open(victim, os.O_RDONLY | os.O_TRUNC),
    lambda: os.open(victim, 3 | os.O_TRUNC),
    lambda: os.open(victim, os.O_WRONLY | os.O_TRUNC),
    lambda: os.open(victim, os.O_RDWR | os.O_TRUNC),
    lambda: open(victim, "a"),
):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("truncated")
with open(f"{home}/mine", "w") as file:
    file.write("mine")
    file.truncate(0)
"""


def test_nothing_is_truncated_where_landlock_cannot_forbid_it(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "read").mkdir()
    victim = tmp_path / "read" / "victim"
    victim.write_text("whole")
    ran = subprocess.run(
        [sys.executable, "-c", OLD_LANDLOCK, str(tmp_path / "home"), str(victim)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert victim.read_text() == "whole"


def test_the_filter_s_numbers_are_the_kernel_s():
    """Compared with the headers, if installed; AArch64 uses the generic numbers."""
    headers = {
        0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        1: Path("/usr/include/asm-generic/unistd.h"),
    }
    for column, header in headers.items():
        if not header.is_file():
            continue
        lines = [line.split() for line in header.read_text().splitlines()]
        known = {
            line[1].removeprefix("__NR_").removeprefix("__NR3264_"): line[2]
            for line in lines
            if line[:1] == ["#define"] and len(line) > 2
        }
        known["newfstatat"] = known.get("newfstatat") or known.get("fstatat", "")
        for name, numbers in sandbox_walls.ALLOWED.items():
            number = numbers[column]
            if number is not None and known.get(name, "").isdigit():
                assert int(known[name]) == number, name


def test_what_is_left_is_removed_whatever_it_is():
    with tempfile.TemporaryDirectory() as folder:  # accessible to anyone
        remove_all_kinds(Path(folder))


def remove_all_kinds(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").write_text("whole")
    (outside / "file").chmod(0o640)
    home = tmp_path / "home"
    home.mkdir()
    deep = os.open(home, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=deep)
        inner = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = inner
    os.symlink(outside, "link", dir_fd=deep)
    os.close(deep)
    for name in (b"\xff\xfe", b"new\nline", b"-rf", b"0", b"1"):
        os.mkdir(os.fsencode(home) + b"/" + name)
        Path(os.fsdecode(os.fsencode(home) + b"/" + name + b"/\xff")).write_text("x")
    locked = home / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "folder").symlink_to(outside)
    (locked / "inner" / "file").symlink_to(outside / "file")
    (locked / "gone").symlink_to("nowhere")
    for i in range(2000):
        (home / f"file{i}").touch()
    os.mkfifo(home / "fifo")
    (locked / "inner").chmod(0)
    locked.chmod(0)
    home.chmod(0)
    if root := os.geteuid() == 0:  # whom locks do not stop
        subprocess.run(["chown", "-hR", "65534:65534", tmp_path], check=True)
    if (child := os.fork()) == 0:
        try:
            if root:
                os.setresuid(65534, 65534, 65534)
            remove_tree(str(home))
        finally:
            os._exit(1 if home.exists() else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(tmp_path) == ["outside"]
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755
    assert stat.S_IMODE((outside / "file").stat().st_mode) == 0o640
    assert (outside / "file").read_text() == "whole"


@pytest.mark.parametrize("extent", ["all", "fewest"])
def test_a_program_s_own_mess_is_removed(extent, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    if extent == "fewest":
        monkeypatch.setattr(sandbox, "_walls", lambda: ())
    program = """
import os
for i in range(700):
    os.mkdir("nested")
    os.chdir("nested")
    open(b"\\xff" + bytes([65 + i % 26]), "w").close()
import time
time.sleep(0.2)
raise ValueError("done")
"""
    watched = "files that cannot be counted: File name too long"
    told = {"all": "ValueError: done", "fewest": watched}
    assert run_program(program, Limits(files=2000)).why == told[extent]
    assert os.listdir(tmp_path) == []


def test_what_killed_evaluations_left_is_removed_and_what_living_ones_use_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    for name in ("btx_jax-sandbox-dead", "btx_jax-sandbox-alive", "another"):
        (tmp_path / name / "inner").mkdir(parents=True)
    with locked(tmp_path / "btx_jax-sandbox-alive"):
        sandbox._remove_left_overs()
        assert len(os.listdir(tmp_path)) == 3, "too young: it may be about to be locked"
        now = time.time()
        monkeypatch.setattr(sandbox.time, "time", lambda: now + 61)
        sandbox._remove_left_overs()
    assert sorted(os.listdir(tmp_path)) == ["another", "btx_jax-sandbox-alive"]


def test_the_sandbox_ends_with_the_process_that_started_it():
    code = (
        "from btx_jax.evaluation.sandbox import run_program, Limits\n"
        "print('started', flush=True)\n"
        "run_program('import time\\ntime.sleep(60)', Limits(seconds=60))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    try:
        assert child.stdout.readline() == b"started\n"
        found: list[str] = []
        deadline = time.monotonic() + 30
        while len(found) < 2 and time.monotonic() < deadline:  # judge and solver
            keepers = children.read_text().split()
            found = [
                pid
                for keeper in keepers
                for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
            ]
            time.sleep(0.02)
        assert len(found) >= 2
    finally:
        child.kill()
        child.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in found if Path(f"/proc/{pid}").exists()]


def test_pass_at_k_is_the_chance_of_a_draw():
    assert pass_at_k(5, 0, 3) == 0
    assert pass_at_k(5, 5, 1) == 1
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k=3: there are 2 samples"):
        pass_at_k(2, 1, 3)


@pytest.mark.skipif(
    not os.environ.get("BTX_DATA_DIR"), reason="HumanEval lies in BTX_DATA_DIR/evals"
)
def test_humaneval_s_reference_solutions_pass():
    with gzip.open(
        Path(os.environ["BTX_DATA_DIR"]) / "evals" / "humaneval.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        problems = [json.loads(line) for line in file]
    programs = [p["prompt"] + p["canonical_solution"] for p in problems]
    tests = [UnitTests(p["test"], p["entry_point"], p["prompt"]) for p in problems]
    outcomes = run_programs(programs, show=False, tests=tests)
    assert len(outcomes) == 164
    assert [
        p["task_id"] for p, outcome in zip(problems, outcomes, strict=True) if not outcome.passed
    ] == []
    nothing = run_programs([p["prompt"] for p in problems[::10]], show=False, tests=tests[::10])
    assert not [outcome for outcome in nothing if outcome.passed]
