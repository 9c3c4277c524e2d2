"""Time and memory of a training step: MoLA compared with plain LoRA of the same total rank and with
full finetuning, in alternating rounds of one process.

    python benchmarks/lora.py [--layers=12] [--rounds=5] [--batch=2] [--length=128]

The model has SmolLM2-135M's widths and random weights, which do not affect the cost of a step. All
variants use float32, the same batch and the same loop over layers. Ratios are medians over rounds;
memory is that of the compiled step, including parameters and moments.
"""

import argparse
import dataclasses
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LoRAConfig, ModelConfig
from btx_jax.models.llama import parameter_counts
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import init_state, make_train_step

PLAIN = "LoRA r=40"


def sides(base: ModelConfig) -> dict[str, ModelConfig]:
    adapted = lambda **lora: dataclasses.replace(base, lora=LoRAConfig(**lora))  # noqa: E731
    return {
        PLAIN: adapted(allocation="1", rank=(40,), k=(1,), alpha=80.0),
        "MoLA 5555": adapted(allocation="5555"),
        "MoLA 2468": adapted(allocation="2468"),
        "full finetuning": base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("layers", 12), ("rounds", 5), ("batch", 2), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--remat", default="none")
    args = parser.parse_args()
    base = ModelConfig(49_152, args.layers, 576, 1536, 9, 3, 64, tied_head=True, context=2048)
    compute = ComputeConfig(dtype="float32", remat=args.remat, loss_chunk=256)
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    tokens = jax.random.randint(
        jax.random.key(1), (args.batch, args.length + 1), 0, base.vocab_size, jnp.int32
    )
    batch, key = {"tokens": tokens, "segments": jnp.ones_like(tokens)}, jax.random.key(2)

    programs, memory, states, seconds = {}, {}, {}, {}
    for name, model in sides(base).items():
        train = TrainConfig(
            10, args.batch, warmup_steps=1, frozen="base" if model.lora else "", balance_weight=0.0
        )
        start = time.perf_counter()
        programs[name] = make_train_step(model, compute, train, mesh, args.length)
        compiling = time.perf_counter() - start
        memory[name] = programs[name].bytes / 2**20
        states[name] = init_state(model, train, mesh, key)
        seconds[name] = []
        trained = parameter_counts(model)[0] - (parameter_counts(base)[0] if model.lora else 0)
        print(
            f"{name}: {trained / 1e6:.2f}M parameters trained, compiled in {compiling:.0f} s",
            flush=True,
        )
    for number in range(args.rounds + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            states[name], metrics = program(states[name], batch, key)
            jax.block_until_ready((states[name], metrics))
            if number > 1:  # not the first two, which allocate memory
                seconds[name].append(time.perf_counter() - start)
    for name in programs:
        ratios = [a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)]
        full = [a / b for a, b in zip(seconds[name], seconds["full finetuning"], strict=True)]
        print(
            f"{name}: {statistics.median(seconds[name]):.2f} s a step;"
            f" {statistics.median(ratios):.2f} of {PLAIN} ({min(ratios):.2f} to {max(ratios):.2f});"
            f" {statistics.median(full):.2f} of full finetuning; {memory[name]:.0f} MiB"
        )


if __name__ == "__main__":
    main()
