"""Time and memory of one training step: measured on this machine, or from the compiler's clock for
TPUs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.evaluation.heldout import make_heldout_step
from btx_jax.planning import compile_check
from btx_jax.training.start import checked_mesh
from btx_jax.training.step import init_state, make_train_step

TIMED_SECONDS, MOST_TIMED = 5.0, 20  # most seconds and most repetitions of a measurement
WARM_UP = 2  # first calls take longer: memory is still being allocated
PASSES = 3  # cost of a training step in forward passes, without rematerialisation


@dataclass(frozen=True)
class Step:
    """Cost of a training step. seconds: per step. compile_seconds: on this machine.
    heldout_seconds: per row of the held-out loss. memory: bytes on each device as compiled, 0 if
    unknown. fits: whether that much is available."""

    seconds: float
    compile_seconds: float
    heldout_seconds: float
    memory: float
    fits: bool = True


Steps = Callable[[Config, ModelConfig], Step]  # (training config, the model it trains) -> Step


def on_this_machine(config: Config, model: ModelConfig) -> Step:
    """Compile the step and time it here, with random parameters and tokens."""
    assert config.train and config.compute and config.data
    train, length = config.train, config.data.sequence_length
    mesh = checked_mesh(config, model)
    start = time.monotonic()
    step = make_train_step(model, config.compute, train, mesh, length)
    compile_seconds = time.monotonic() - start
    state = init_state(model, train, mesh, jax.random.key(0))
    batch = _rows(model, train.batch_size, length)
    key = jax.random.key(1)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)

    seconds = _timed(run)
    heldout, rows = make_heldout_step(model, config.compute, mesh), train.batch_size
    few = _rows(model, rows, length)
    heldout_seconds = _timed(
        lambda: jax.block_until_ready(heldout(state.params, few["tokens"], few["segments"]))
    )
    return Step(seconds, compile_seconds, heldout_seconds / rows, float(step.bytes))


def _rows(model: ModelConfig, count: int, length: int) -> dict[str, Any]:
    tokens = jax.random.randint(
        jax.random.key(2), (count, length + 1), 0, model.vocab_size, "int32"
    )
    return {"tokens": tokens, "segments": tokens * 0 + 1}


def _timed(run: Callable[[], Any]) -> float:
    """Median seconds of a call, after WARM_UP untimed calls."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    while sum(times) < TIMED_SECONDS and len(times) < MOST_TIMED:
        start = time.monotonic()
        run()
        times.append(time.monotonic() - start)
    return sorted(times)[len(times) // 2]


def on_slice(topology: str, slices: int) -> Steps:
    """Return a function that compiles steps for this many slices of a TPU topology. Raises
    UserError if libtpu is missing or does not know the topology."""
    devices = compile_check.topology_devices(topology, slices)

    def step(config: Config, model: ModelConfig) -> Step:
        assert config.train
        found = compile_check.check(config, model, devices, topology)
        seconds = found.clock.get("seconds", float("inf"))
        heldout = seconds / config.train.batch_size / PASSES
        return Step(
            seconds, found.compile_seconds, heldout, found.memory.get("total", 0.0), found.fits
        )

    return step
