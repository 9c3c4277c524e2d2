"""TPU compiler options set to other values than libtpu's defaults, by kind of chip. They apply to
every program of a run, and to the compile check.

Gains are computed with the compiler's clock (costs/clock.py) on a training step of the Llama-2-7B
expert with jax 0.10.2 and libtpu 0.0.42.1, each on top of the preceding ones. "gathers continued"
means with the continuation fusions that docs/tpu.md describes. Names and groups follow MaxText's
xla_flags_library.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from btx_jax.errors import UserError


@dataclass(frozen=True)
class Options:
    """Options that belong together. values: name -> value. gain: step times without and with them,
    by the compiler's clock."""

    values: Mapping[str, str]
    reason: str
    gain: str


REFUSALS = ("No such compile option", "into flag", "FAILED_PRECONDITION")
CONTINUE = "xla_tpu_enable_async_collective_fusion_fuse_"
TILES = (
    "larger matmul tiles: operands are read, and producers fused into them recomputed, less often"
)
# Continuation fusions would hide gathers on v5p and v6e as well, but libtpu 0.0.50 rejects them
# there because they "might lead to incorrect results". On v5e they are its default.
SCATTERS = Options(
    {f"{CONTINUE}reduce_scatter": "true", "xla_enable_async_reduce_scatter_fusion": "true"},
    "gradients are scattered while products run",
    "v5e:4x4: 115.0 s to 113.0 s",
)


def _vector_memory(mebibytes: int) -> dict[str, str]:
    return {"xla_tpu_scoped_vmem_limit_kib": str(1024 * mebibytes)}


# jax's device_kind -> options, in the order in which they were measured
OPTIONS: Mapping[str, tuple[Options, ...]] = {
    "TPU v5 lite": (
        Options(_vector_memory(32), TILES, "v5e:4x4: 129.3 s to 115.0 s"),
        SCATTERS,
    ),
    "TPU v5": (Options(_vector_memory(32), TILES, "v5p:2x2x2: 106.0 s to 95.4 s"),),
    "TPU v6 lite": (
        Options(_vector_memory(64), TILES, "v6e:4x4, gathers continued: 46.6 s to 43.5 s"),
        Options(
            {
                f"{CONTINUE}all_gather": "false",
                "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
            },
            "sparse cores gather weights while products run",
            "v6e:4x4, both rows: 53.7 s to 41.8 s",
        ),
        Options(
            {
                f"{CONTINUE}reduce_scatter": "false",
                "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
            },
            "sparse cores scatter gradients too",
            "v6e:4x4: 41.8 s to 37.8 s",
        ),
    ),
}


def compiler_options(device: jax.Device, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Options for programs on this kind of device: name -> value.

    overrides: each NAME=VALUE, which takes precedence over the table, or NAME=, which restores the
    compiler's default. Raises UserError for anything else.
    """
    chosen: dict[str, str] = {}
    for options in OPTIONS.get(device.device_kind, ()):
        chosen |= options.values
    for override in overrides:
        name, equals, value = override.partition("=")
        if not name or not equals:
            raise UserError(
                f"config.compute.compiler_options: {override!r}: write NAME=VALUE, or NAME= for"
                " the compiler's own"
            )
        chosen[name] = value
    return {name: value for name, value in chosen.items() if value}


def compiled(lowered: jax.stages.Lowered) -> Any:
    """Compile a lowered step. Raises UserError for options that this compiler rejects."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        told = str(error).splitlines()[0]
        if not any(words in told for words in REFUSALS):
            raise
        raise UserError(
            f"config.compute.compiler_options: {told}; NAME= leaves an option out"
        ) from None
