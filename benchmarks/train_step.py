"""Tokens per second of a training step compared with transformers (PyTorch), float32, same shapes,
same machine, in one run.

    pip install -e '.[bench]' && python benchmarks/train_step.py [--rounds=5]

Five programs: a dense Llama here and in transformers; a Mixtral (4 experts, top-2) in transformers
and here with einsum and with ragged dispatch; and a dense model here with twice the feed-forward
width, which has the mixture's active parameters. A step is forward, backward, gradient clipping and
AdamW. Every program runs in a separate process; rounds go A B C D E, A B C D E, ..., so that
changes in the machine's speed affect all of them; medians over rounds are compared.
`--profile=PROGRAM` shows what one of our steps spends its time on, `--matmuls` how fast each
framework multiplies the matrices of these models.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

SHAPE = {
    "vocab_size": 4096,
    "layers": 8,
    "d_model": 256,
    "d_ff": 688,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 32,
}
BATCH, LENGTH = 8, 256
EXPERTS, TOP_K = 4, 2
WARM_UP = 4  # untimed steps of each program
STEPS = 4  # timed steps of each program per round
# Huge pages are on: without them, every step of either framework requests hundreds of megabytes
# from the kernel, 4 KiB at a time. YNN is off: XLA then multiplies with Eigen, which is faster for
# an expert's matrices and equally fast for the rest.
ENVIRONMENT = {
    **os.environ,
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
}
PROGRAMS = ("torch_dense", "jax_dense", "torch_moe", "jax_einsum", "jax_ragged", "jax_dense_active")


def jax_step(program: str):
    """Return (step function that blocks until the step is done, parameters)."""
    import dataclasses

    import jax

    from btx_jax.config.config import ComputeConfig, TrainConfig
    from btx_jax.config.model_config import ModelConfig, MoEConfig
    from btx_jax.models.llama import parameter_counts
    from btx_jax.parallel.sharding import make_mesh
    from btx_jax.training.step import init_state, make_train_step

    model = ModelConfig(**SHAPE, context=LENGTH)
    if program == "jax_dense_active":
        model = dataclasses.replace(model, d_ff=TOP_K * SHAPE["d_ff"])
    elif program != "jax_dense":
        model = dataclasses.replace(model, moe=MoEConfig((EXPERTS,) * SHAPE["layers"], k=TOP_K))
    dispatch = "ragged" if program == "jax_ragged" else "einsum"
    compute = ComputeConfig(
        dtype="float32",
        remat="none",
        unroll=SHAPE["layers"],
        dispatch=dispatch,
        group_size=64,
        loss_chunk=512,
    )
    train = TrainConfig(steps=1000, batch_size=BATCH, warmup_steps=10, balance_weight=0.01)
    mesh = make_mesh((1, 1, 1, 1))
    compiled = make_train_step(model, compute, train, mesh, LENGTH)
    state = init_state(model, train, mesh, jax.random.key(0))
    tokens = jax.random.randint(
        jax.random.key(1), (BATCH, LENGTH + 1), 0, SHAPE["vocab_size"], "int32"
    )
    batch = {"tokens": tokens, "segments": tokens * 0 + 1}

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, jax.random.key(2))
        jax.block_until_ready((state, metrics))

    return step, parameter_counts(model)


def torch_step(program: str):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": SHAPE["vocab_size"], "hidden_size": SHAPE["d_model"], "intermediate_size": SHAPE["d_ff"],
        "num_hidden_layers": SHAPE["layers"], "num_attention_heads": SHAPE["heads"], "num_key_value_heads": SHAPE["kv_heads"],
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    if program == "torch_dense":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        config = transformers.MixtralConfig(
            **shape,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            sliding_window=None,
            output_router_logits=True,
        )
        model = transformers.MixtralForCausalLM(config)
    model = model.float()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    total = sum(p.numel() for p in model.parameters())
    return step, (total, total)


def serve(program: str) -> None:
    """Set up the program, then run one round for every line on standard input and answer with
    seconds per step."""
    step, counts = (torch_step if program.startswith("torch") else jax_step)(program)
    for _ in range(WARM_UP):
        step()
    print(json.dumps(counts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        print((time.perf_counter() - start) / STEPS, flush=True)


def profile(program: str) -> None:
    """Milliseconds per step of each kind of operation in a JAX program, from its profiler trace
    (summed over threads)."""
    import collections
    import glob
    import gzip
    import re
    import tempfile

    import jax

    step, _ = jax_step(program)
    for _ in range(WARM_UP):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        trace = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)[0]
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            spent[re.sub(r"[.0-9]+$", "", event["name"])] += event["dur"] / 1e3
    for name, milliseconds in spent.most_common(15):
        print(f"{name:45} {milliseconds:8.1f} ms")
    print(f"{'all':45} {sum(spent.values()):8.1f} ms")


def matmuls() -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(description, einsum, left shape, right shape) of the matmuls that make up a step."""
    rows, d, f, heads, head_dim = (
        BATCH * LENGTH,
        SHAPE["d_model"],
        SHAPE["d_ff"],
        BATCH * SHAPE["heads"],
        SHAPE["head_dim"],
    )
    claims = rows * TOP_K  # rows of all experts together
    return [
        ("FFN in, forward", "md,df->mf", (claims, d), (d, f)),
        ("FFN in, gradient of x", "mf,df->md", (claims, f), (d, f)),
        ("FFN in, gradient of w", "md,mf->df", (claims, d), (claims, f)),
        ("FFN out, forward", "mf,fd->md", (claims, f), (f, d)),
        ("attention projection", "md,de->me", (rows, d), (d, d)),
        ("attention scores", "btk,bsk->bts", (heads, LENGTH, head_dim), (heads, LENGTH, head_dim)),
        ("head", "md,dv->mv", (rows, d), (d, SHAPE["vocab_size"])),
    ]


def serve_matmuls(framework: str) -> None:
    """For every line on standard input, one line of JSON: gigaflops per second of each product."""
    programs = []
    for _, equation, left, right in matmuls():
        if framework == "torch":
            import torch

            arrays = torch.randn(left), torch.randn(right)
            call = lambda arrays=arrays, equation=equation: torch.einsum(equation, *arrays)  # noqa: E731
        else:
            import jax

            arrays = (
                jax.random.normal(jax.random.key(0), left),
                jax.random.normal(jax.random.key(1), right),
            )
            product = jax.jit(lambda a, b, equation=equation: jax.numpy.einsum(equation, a, b))
            call = lambda arrays=arrays, product=product: jax.block_until_ready(product(*arrays))  # noqa: E731
        letters = dict(zip(equation.split("->")[0].replace(",", ""), left + right, strict=True))
        programs.append((2 * math.prod(letters.values()), call))
        call()
    for _ in sys.stdin:
        speeds = []
        for flops, call in programs:
            times = []
            for _ in range(15):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            speeds.append(flops / statistics.median(times) / 1e9)
        print(json.dumps(speeds), flush=True)


def compare_matmuls(rounds: int) -> None:
    speeds: dict[str, list[list[float]]] = {"xla": [], "torch": []}
    workers = {name: start_worker("--serve-matmuls", name) for name in speeds}
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            speeds[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print(f"{'GFLOP/s, median of rounds':26} {'XLA':>5} {'PyTorch':>8} {'ratio':>6}")
    for i, (what, *_) in enumerate(matmuls()):
        ours, theirs = (
            statistics.median(row[i] for row in speeds[name]) for name in ("xla", "torch")
        )
        print(f"{what:26} {ours:5.0f} {theirs:8.0f} {ours / theirs:6.2f}")


def start_worker(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=ENVIRONMENT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--serve-matmuls", choices=("xla", "torch"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--matmuls",
        action="store_true",
        help="GFLOP/s of XLA and PyTorch for the products of these models",
    )
    parser.add_argument(
        "--profile",
        choices=[name for name in PROGRAMS if name.startswith("jax")],
        help="where one program's time goes",
    )
    args = parser.parse_args()
    if args.profile:
        if dict(os.environ) != ENVIRONMENT:  # both are read only at process start
            os.execve(sys.executable, [sys.executable, *sys.argv], ENVIRONMENT)
        profile(args.profile)
        return
    if args.matmuls:
        compare_matmuls(args.rounds)
        return
    if args.serve_matmuls:
        serve_matmuls(args.serve_matmuls)
        return
    if args.serve:
        serve(args.serve)
        return
    workers, seconds = {}, {name: [] for name in PROGRAMS}
    for name in PROGRAMS:  # sequentially, as set-up compiles
        workers[name] = start_worker("--serve", name)
        counts = json.loads(workers[name].stdout.readline())
        print(f"{name}: {counts[0] / 1e6:.2f}M parameters", flush=True)
    for _ in range(args.rounds):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print(f"\n{'program':18} {'tokens/s':>9}  seconds per step: median (min to max)")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:18} {BATCH * LENGTH / median:9.0f}  {median:.3f} ({min(times):.3f} to"
            f" {max(times):.3f})"
        )
    print("\nratio of tokens/s, median over rounds (min to max)")
    for ours, theirs in (
        ("jax_dense", "torch_dense"),
        ("jax_einsum", "torch_moe"),
        ("jax_ragged", "torch_moe"),
        ("jax_einsum", "jax_dense_active"),
        ("jax_ragged", "jax_dense_active"),
    ):
        ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        print(
            f"{ours:11} / {theirs:17} {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
