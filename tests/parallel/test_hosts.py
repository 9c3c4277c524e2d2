"""Two processes that find each other through the environment, as on a pod."""

import os
import socket
import subprocess
import sys

import pytest

from btx_jax.errors import UserError
from btx_jax.parallel import hosts
from tests.conftest import ROOT

PROGRAM = """
from btx_jax.parallel import hosts
hosts.start()
import jax
print(jax.process_index(), jax.process_count(), jax.device_count(), hosts.is_first())
"""


def run(**environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_join_and_one_of_them_is_the_first():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    both = [
        run(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]
    assert [process.communicate(timeout=120)[0].split() for process in both] == [
        ["0", "2", "2", "True"],
        ["1", "2", "2", "False"],
    ]


def test_without_a_coordinator_a_process_is_alone():
    assert run().communicate(timeout=120)[0].split() == ["0", "1", "1", "True"]


def test_half_a_description_of_the_processes_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='': must be a number"):
        hosts.start()
