"""Start of a run that spans several processes."""

import os

import jax

from btx_jax.errors import UserError


def start() -> None:
    """Join the other processes when JAX_COORDINATOR_ADDRESS names a coordinator. Must run before anything touches a device.

    JAX reads that variable alone; JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here, and left to JAX's own detection (TPU pods, SLURM)
    when neither is set. Raises UserError when one is missing or no number.
    """
    if not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        jax.distributed.initialize()
        return
    for name, value in zip(names, values, strict=True):
        if not value.isdigit():
            raise UserError(f"{name}={value!r}: must be a number when JAX_COORDINATOR_ADDRESS is set; set both {' and '.join(names)}")
    jax.distributed.initialize(num_processes=int(values[0]), process_id=int(values[1]))


def is_first() -> bool:
    """Whether this process writes the logs and the small files."""
    return jax.process_index() == 0
