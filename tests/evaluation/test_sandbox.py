"""Programs that try to get out. Each says what it managed to do by running to its end, so that
passing means escaping."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from btx_jax.evaluation.sandbox import Limits, pass_at_k, run_program, run_programs

ESCAPES = {
    "infinite loop": "while True: pass",
    "sleeps": "import time\ntime.sleep(100)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "process": "import subprocess\nsubprocess.run(['true'], check=True)",
    "execve": "import os\nos.execv('/bin/true', ['true'])",
    "file outside": "open('/tmp/btx_jax-escaped', 'w').write('x')",
    "file in home": "import pathlib\npathlib.Path('{home}/btx_jax-escaped').write_text('x')",
    "removes a file": "import os\nos.remove('{victim}')",
    "truncates a file": "import os\nos.truncate('{victim}', 0)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "socket pair": "import socket\nsocket.socketpair()",
    "two gigabytes": "x = bytearray(2 << 30)",
    "large file": "open('big', 'wb').write(bytes(1 << 21))",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "raises": "assert 1 == 2, 'wrong answer'",
    "leaves early": "import os\nos._exit(0)",
    "exits with success": "raise SystemExit(0)",
    "says that it could not be contained": "import sys\nsys.exit('sandbox: seccomp: no')",
    "claims to have passed": (
        "import os, sys\nos.write(int(sys.argv[2]), sys.argv[-1].encode())\nos._exit(0)"
    ),
    "not Python": "def f(:",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_broken_or_hostile_program_is_contained(name, tmp_path):
    import socket

    victim = tmp_path / "victim"
    victim.write_text("whole")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        program = ESCAPES[name].replace("{home}", str(Path.home())).replace("{victim}", str(victim))
        program = program.replace("{port}", str(server.getsockname()[1]))
        before, start = os.getpid(), time.monotonic()
        outcome = run_program(program, Limits(seconds=2, memory=1 << 30))
        assert not outcome.passed
        assert outcome.why
        assert time.monotonic() - start < 20
        assert os.getpid() == before
    assert victim.read_text() == "whole"
    assert not Path("/tmp/btx_jax-escaped").exists()
    assert not (Path.home() / "btx_jax-escaped").exists()


def test_the_reason_is_told():
    assert run_program("raise ValueError('seven')").why == "ValueError: seven"
    assert run_program("while True: pass", Limits(seconds=1)).why == "timeout"
    assert "MemoryError" in run_program("x = bytearray(2 << 30)").why
    assert "Operation not permitted" in run_program("import socket\nsocket.socket()").why


def test_honest_programs_pass():
    programs = [
        "print('x' * 10)\nassert sum(range(10)) == 45",
        "open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'",
        "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()",
        "import math, random, collections, re, hashlib\nassert math.gcd(4, 6) == 2",
    ]
    outcomes = run_programs(programs, show=False)
    assert [outcome.passed for outcome in outcomes] == [True] * 4, outcomes


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
    programs = [
        f"{p['prompt']}{p['canonical_solution']}\n{p['test']}\ncheck({p['entry_point']})\n"
        for p in problems
    ]
    outcomes = run_programs(programs, show=False)
    assert len(outcomes) == 164
    assert [
        p["task_id"] for p, outcome in zip(problems, outcomes, strict=True) if not outcome.passed
    ] == []
