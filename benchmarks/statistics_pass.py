"""The pass that solves routers and shared weights (mixing/states.py), compiled for one TPU chip at
Llama-2-7B's shape: does a layer with a text of 8,192 tokens fit, and how much does it compute?

    python benchmarks/statistics_pass.py [--topology=v5e:2x2] [--preset=llama2_7b]

Each layer runs these programs for each text, one after another; sums are computed on the host.
Needs libtpu (`pip install -e '.[tpu]'`), but no TPU. Times cannot be measured without one.
"""

import argparse
from unittest import mock

import jax
import jax.numpy as jnp

from btx_jax.config.config import MixConfig
from btx_jax.costs.program import read_program
from btx_jax.mixing import states
from btx_jax.models.llama import abstract_params
from btx_jax.planning.compile_check import topology_devices
from btx_jax.presets.recipes import MODELS

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--preset", default="llama2_7b")
    args = parser.parse_args()
    model, device = MODELS[args.preset], topology_devices(args.topology, 1)[0]
    on_chip = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)

    (run,) = [name for name in abstract_params(model) if name.startswith("layers_")]
    layer = jax.tree.map(
        lambda leaf: array(*leaf.value.shape[1:]),
        abstract_params(model)[run],
        is_leaf=lambda leaf: hasattr(leaf, "value"),
    )
    length = min(512, model.context)
    rows = MixConfig.tokens // length
    x, segments = array(rows, length, model.d_model), array(rows, length, dtype=jnp.int32)
    y, spec = array(rows, length, model.heads * model.head_dim), model.layer_specs()[0]
    programs = {
        "norm": (states._into_attention, layer, x),
        "heads": (states._heads, spec, layer["attention"], x, segments),
        "output projection": (states._after_heads, layer, x, y),
        "feed-forward": (states._after_ffn, layer, x, x),
    }
    print(f"{args.preset}, {rows} rows of {length} tokens, one chip of {args.topology}")
    # Kernels are chosen by this process's devices; make that choose the chip's.
    with mock.patch("jax.default_backend", return_value="tpu"):
        for name, (program, *given) in programs.items():
            compiled = program.lower(model, *given).compile()
            memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
            total = memory.argument_size_in_bytes + memory.output_size_in_bytes
            total += memory.temp_size_in_bytes
            print(f"{name:18} {total / GIB:5.2f} GiB, {program.dot_flops / 1e12:6.3f} TFLOP")


if __name__ == "__main__":
    main()
