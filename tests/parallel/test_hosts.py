"""Two processes that find each other through the environment, as on a pod."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

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
    environment = {**os.environ, **environment}
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


class Device(NamedTuple):
    process_index: int
    number: int


class Laid(NamedTuple):
    """A sharding: the rows that the devices of each process hold."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def num_devices(self):
        return sum(map(len, self.rows))

    def devices_indices_map(self, shape):
        return {
            Device(process, number): (slice(row, row + 1),)
            for process, rows in enumerate(self.rows)
            for number, row in enumerate(rows)
        }


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        (((0, 1), (2, 3)), [(0, 2), (1, 2)]),
        (((0, 2), (1, 3)), [(0, 2), (1, 2)]),
        (((0, 0), (1, 1), (0, 0), (1, 1)), [(0, 2), (1, 2), (0, 2), (1, 2)]),
        (((0, 0), (0, 0)), [(0, 1), (0, 1)]),
        (((0, 1), (1, 2), (2, 0)), [(0, 1)] * 3),
    ],
    ids=["apart", "interleaved", "in pairs", "together", "overlapping"],
)
def test_processes_that_hold_the_same_rows_read_the_same(rows, shares, monkeypatch):
    for process, share in enumerate(shares):
        monkeypatch.setattr(hosts.jax, "process_index", lambda process=process: process)
        assert hosts.share_of_rows(Laid(rows)) == share
