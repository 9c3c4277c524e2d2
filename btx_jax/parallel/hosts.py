"""Start of a run that spans several processes."""

import os

import jax


def start() -> None:
    """Join the other processes when the environment names a coordinator (JAX_COORDINATOR_ADDRESS and friends).

    Must run before anything touches a device. JAX reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes the logs and the small files."""
    return jax.process_index() == 0
