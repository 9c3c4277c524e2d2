"""Decide whether this machine may have a TPU, before JAX looks for one.

Where libtpu is installed, JAX loads it on every machine. Without a TPU, libtpu prints many lines to
stderr from C++, which cannot be caught here. JAX is therefore told to skip the TPU backend, but
only where no sign of a TPU is found: silently ignoring an existing TPU would be worse.
"""

import glob
import os

import jax
from jax.extend.backend import register_backend_factory

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # Cloud TPU VMs, GKE and Colab: v2 to v4; v5 on
# Set by JAX where it finds no TPU on the PCI bus, and by libtpu wherever it is imported.
SET_WITHOUT_ONE = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def has_tpu_device() -> bool:
    """Whether the device files of a TPU exist. Other devices may use the same names."""
    return any(glob.glob(pattern) for pattern in DEVICES)


def may_have_tpu() -> bool:
    """False where nothing hints at a TPU: no device file, and no environment variable about TPUs
    such as TPU VMs, GKE and Colab set."""
    return has_tpu_device() or any(
        {"TPU", "LIBTPU"} & set(name.split("_"))
        for name in os.environ
        if name not in SET_WITHOUT_ONE
    )


def chosen_platforms() -> str:
    """The platforms chosen by JAX_PLATFORMS, or by JAX itself, which asks for `tpu,cpu` when it
    sees a chip on the PCI bus and has libtpu; "" for none."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def leave_absent_tpu() -> None:
    """Keep JAX from loading libtpu where there can be no TPU; GPUs are still found. Must run before
    anything touches a device. Does not affect compiling for an absent TPU (`compile_check`)."""
    is_chosen = "JAX_PLATFORMS" in os.environ or chosen_platforms()
    if not is_chosen and not may_have_tpu():
        register_backend_factory("tpu", _absent, priority=300, fail_quietly=True)


def _absent() -> None:
    raise RuntimeError("no TPU on this machine")
