"""Decide whether this machine may have a TPU, before JAX looks for one.

Where libtpu is installed, JAX loads it on every machine. Without a TPU, libtpu prints many lines to
stderr from C++, which cannot be caught here. JAX is therefore told to skip the TPU backend, but
only where no sign of a TPU is found: silently ignoring an existing TPU would be worse.
"""

import glob
import os

import jax
from jax.extend.backend import register_backend_factory

# Device files on Cloud TPU VMs, GKE and Colab: of v2 to v4; of v5 and later.
DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# Set by JAX where it finds no TPU on the PCI bus, and by libtpu whenever it is imported.
SET_WITHOUT_ONE = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def has_tpu_device() -> bool:
    """Whether there are device files with the names that TPUs use. Other devices may use them
    too."""
    return any(glob.glob(pattern) for pattern in DEVICES)


def may_have_tpu() -> bool:
    """Whether anything indicates a TPU: a device file, or an environment variable about TPUs, such
    as those set on TPU VMs, GKE and Colab."""
    return has_tpu_device() or any(
        {"TPU", "LIBTPU"} & set(name.split("_"))
        for name in os.environ
        if name not in SET_WITHOUT_ONE
    )


def chosen_platforms() -> str:
    """The platforms chosen by JAX_PLATFORMS, or by JAX itself, which chooses `tpu,cpu` when it sees
    a chip on the PCI bus and has libtpu; "" if none are chosen."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def leave_absent_tpu() -> None:
    """Keep JAX from loading libtpu if nothing indicates a TPU; GPUs are still found. Must run
    before anything touches a device. Does not affect compiling for an absent TPU
    (`compile_check`)."""
    is_chosen = "JAX_PLATFORMS" in os.environ or chosen_platforms()
    if not is_chosen and not may_have_tpu():
        register_backend_factory("tpu", _absent, priority=300, fail_quietly=True)


def _absent() -> None:
    raise RuntimeError("no TPU on this machine")
