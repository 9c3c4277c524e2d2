"""Which accelerators this machine may have, asked before JAX looks for them.

Where libtpu is installed JAX loads it on every machine, and where there is no TPU libtpu says so in
many lines on stderr, from C++, which nothing here can catch. So JAX is told to leave it alone, but
only where no sign of a TPU is found: a TPU that is there and not used would be the worse fault.
"""

import glob
import os

import jax
from jax.extend.backend import register_backend_factory

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # Cloud TPU VMs, GKE and Colab: v2 to v4; v5 on
# By JAX, where it finds no TPU on the PCI bus, and by libtpu, wherever it is imported.
SET_WITHOUT_ONE = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def has_tpu_device() -> bool:
    """Whether there are the files that a TPU is reached through. Other devices may have such."""
    return any(glob.glob(pattern) for pattern in DEVICES)


def may_have_tpu() -> bool:
    """False where nothing hints at a TPU: no device file, and no variable of the environment that
    speaks of TPUs, as those of TPU VMs, GKE and Colab do."""
    return has_tpu_device() or any(
        {"TPU", "LIBTPU"} & set(name.split("_"))
        for name in os.environ
        if name not in SET_WITHOUT_ONE
    )


def chosen_platforms() -> str:
    """By JAX_PLATFORMS, or by JAX, which asks for `tpu,cpu` where it sees a chip on the PCI bus and
    has libtpu."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def leave_absent_tpu() -> None:
    """Where there can be no TPU, JAX does not load libtpu to look for one; GPUs are found as ever.
    Must run before anything touches a device. Compiling for a TPU that is not there
    (`compile_check`) is no matter of this."""
    is_chosen = "JAX_PLATFORMS" in os.environ or chosen_platforms()
    if not is_chosen and not may_have_tpu():
        register_backend_factory("tpu", _absent, priority=300, fail_quietly=True)


def _absent() -> None:
    raise RuntimeError("no TPU on this machine")
