"""Tokens per second of a training step compared with transformers (PyTorch): same shapes, same
machine, one run.

    pip install -e '.[bench]' && python benchmarks/train_step.py [--rounds=5]
    pip install -e '.[bench,cuda]' && python benchmarks/train_step.py --device=gpu

Six programs: a dense Llama here and in transformers; a Mixtral (4 experts, top-2) in transformers
and here with einsum and with ragged dispatch; and a dense model here with twice the feed-forward
width, which has the mixture's active parameters. A step is forward, backward, gradient clipping and
AdamW. Every program runs in a separate process, and medians over rounds are compared.

On a CPU everything is float32, and rounds go A B C D E F, A B C D E F, ..., so that changes in the
machine's speed affect all programs. On a GPU the models have the shape of Llama 3.2 1B, and the
programs have the card to themselves, one after another. There ours computes in bfloat16 and holds
parameters and moments in float32; the peer holds and computes everything in bfloat16 under
torch.compile, as its grouped matmuls require.

`--profile=PROGRAM` shows what one of our steps spends its time on, `--matmuls` how fast each
framework multiplies the matrices of these models.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time


@dataclasses.dataclass(frozen=True)
class Work:
    """What the programs compute on one kind of device. compute: fields of ComputeConfig. steps:
    timed steps per round."""

    shape: dict
    batch: int
    length: int
    compute: dict
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


WORK = {
    "cpu": Work(
        {
            "vocab_size": 4096,
            "layers": 8,
            "d_model": 256,
            "d_ff": 688,
            "heads": 8,
            "kv_heads": 8,
            "head_dim": 32,
        },
        batch=8,
        length=256,
        compute={
            "dtype": "float32",
            "remat": "none",
            "unroll": 8,
            "group_size": 64,
            "loss_chunk": 512,
        },
        steps=4,
    ),
    "gpu": Work(
        {
            "vocab_size": 128_256,
            "layers": 16,
            "d_model": 2048,
            "d_ff": 8192,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 64,
            "tied_head": True,
        },
        batch=2,
        length=4096,
        compute={"dtype": "bfloat16"},
        steps=4,
    ),
}
EXPERTS, TOP_K = 4, 2
WARM_UP = 4  # untimed steps of each program
# Huge pages are on: without them, every step of either framework requests hundreds of megabytes
# from the kernel, 4 KiB at a time. YNN is off: XLA then multiplies with Eigen, which is faster for
# an expert's matrices and equally fast for the rest.
ENVIRONMENTS = {
    "cpu": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
        "JAX_PLATFORMS": "cpu",
    },
    "gpu": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_PLATFORMS": "cuda"},
}
PROGRAMS = ("torch_dense", "jax_dense", "torch_moe", "jax_einsum", "jax_ragged", "jax_dense_active")


def model_config(program: str, work: Work):
    from btx_jax.config.model_config import ModelConfig, MoEConfig

    model = ModelConfig(**work.shape, context=work.length)
    if program == "jax_dense_active":
        return dataclasses.replace(model, d_ff=TOP_K * model.d_ff)
    if program.endswith("_dense"):
        return model
    return dataclasses.replace(model, moe=MoEConfig((EXPERTS,) * model.layers, k=TOP_K))


def jax_step(program: str, work: Work, kernels: str):
    """A function that returns when a step is done."""
    import jax

    from btx_jax.config.config import ComputeConfig, TrainConfig
    from btx_jax.parallel.sharding import make_mesh
    from btx_jax.training.step import init_state, make_train_step

    model = model_config(program, work)
    dispatch = "ragged" if program == "jax_ragged" else "einsum"
    compute = ComputeConfig(**work.compute, dispatch=dispatch, kernels=kernels)
    train = TrainConfig(steps=1000, batch_size=work.batch, warmup_steps=10, balance_weight=0.01)
    mesh = make_mesh((1, 1, 1, 1))
    compiled = make_train_step(model, compute, train, mesh, work.length)
    state = init_state(model, train, mesh, jax.random.key(0))
    shape = work.batch, work.length + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size, "int32")
    batch = {"tokens": tokens, "segments": tokens * 0 + 1}

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, jax.random.key(2))
        jax.block_until_ready((state, metrics))

    return step


def torch_step(program: str, work: Work, device: str):
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, work.compute["dtype"]))
    torch.set_default_device("cuda" if device == "gpu" else "cpu")
    shape = {
        "vocab_size": work.shape["vocab_size"], "hidden_size": work.shape["d_model"],
        "intermediate_size": work.shape["d_ff"], "num_hidden_layers": work.shape["layers"],
        "num_attention_heads": work.shape["heads"], "num_key_value_heads": work.shape["kv_heads"],
        "max_position_embeddings": work.length, "use_cache": False,
        "tie_word_embeddings": work.shape.get("tied_head", False),
    }  # fmt: skip
    if program == "torch_dense":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        config = transformers.MixtralConfig(
            **shape,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            sliding_window=None,
            # The balance loss, which torch.compile cannot put into the model's program.
            output_router_logits=device == "cpu",
        )
        model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, shape["vocab_size"], (work.batch, work.length))
    run = torch.compile(model) if device == "gpu" else model

    def step():
        optimizer.zero_grad()
        run(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "gpu":
            torch.cuda.synchronize()

    return step


def step_of(args):
    """The step of the program that this process serves."""
    work = WORK[args.device]
    if args.serve.startswith("torch"):
        return torch_step(args.serve, work, args.device)
    return jax_step(args.serve, work, args.kernels)


def serve(args) -> None:
    """Set up the program, then run one round for every line on standard input and answer with
    seconds per step."""
    step = step_of(args)
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    steps = WORK[args.device].steps
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        print((time.perf_counter() - start) / steps, flush=True)


def profile(args) -> None:
    """Milliseconds per step of each kind of operation in a JAX program, from its profiler trace
    (on a CPU summed over threads)."""
    import collections
    import glob
    import gzip
    import re
    import tempfile

    import jax

    step = step_of(args)
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
    work = WORK["cpu"]
    rows, length, shape = work.tokens, work.length, work.shape
    d, f, vocabulary, head_dim = (
        shape[name] for name in ("d_model", "d_ff", "vocab_size", "head_dim")
    )
    heads = work.batch * shape["heads"]
    claims = rows * TOP_K  # rows of all experts together
    return [
        ("FFN in, forward", "md,df->mf", (claims, d), (d, f)),
        ("FFN in, gradient of x", "mf,df->md", (claims, f), (d, f)),
        ("FFN in, gradient of w", "md,mf->df", (claims, d), (claims, f)),
        ("FFN out, forward", "mf,fd->md", (claims, f), (f, d)),
        ("attention projection", "md,de->me", (rows, d), (d, d)),
        ("attention scores", "btk,bsk->bts", (heads, length, head_dim), (heads, length, head_dim)),
        ("head", "md,dv->mv", (rows, d), (d, vocabulary)),
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
    workers = {name: start_worker("cpu", f"--serve-matmuls={name}") for name in speeds}
    for _ in range(rounds):
        for name, worker in workers.items():
            speeds[name].append(json.loads(asked(worker)))
    for worker in workers.values():
        stop(worker)
    print(f"{'GFLOP/s, median of rounds':26} {'XLA':>5} {'PyTorch':>8} {'ratio':>6}")
    for i, (what, *_) in enumerate(matmuls()):
        ours, theirs = (
            statistics.median(row[i] for row in speeds[name]) for name in ("xla", "torch")
        )
        print(f"{what:26} {ours:5.0f} {theirs:8.0f} {ours / theirs:6.2f}")


def start_worker(device: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | ENVIRONMENTS[device],
    )


def answer(worker: subprocess.Popen) -> str:
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a program ended early: {worker.args!r}")
    return line


def asked(worker: subprocess.Popen) -> str:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return answer(worker)


def stop(worker: subprocess.Popen) -> None:
    worker.stdin.close()
    worker.wait()


def compare(args) -> dict[str, list[float]]:
    """Seconds per step of each program in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in args.programs}
    together = [args.programs] if args.device == "cpu" else [[name] for name in args.programs]
    for names in together:
        workers = {}
        for name in names:  # sequentially, as set-up compiles
            start = time.perf_counter()
            workers[name] = start_worker(
                args.device,
                f"--serve={name}",
                f"--device={args.device}",
                f"--kernels={args.kernels}",
            )
            answer(workers[name])
            print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                seconds[name].append(float(asked(worker)))
        for worker in workers.values():
            stop(worker)
        for name in names:
            print(f"{name}: {statistics.median(seconds[name]):.3f} s per step", flush=True)
    return seconds


def flops_per_token(program: str, work: Work) -> float:
    """FLOPs of the model, without what rematerialisation and masked scores add."""
    from btx_jax.costs.model import attention_flops, train_flops

    model = model_config(program, work)
    return train_flops(model, 1) + attention_flops(model, 1, work.length)


def show(seconds: dict[str, list[float]], work: Work, peak: float) -> None:
    """Print the tables. peak: FLOP/s of the device, for MFU; 0 if unknown."""
    print(f"\n{'program':18} {'tokens/s':>9}  seconds per step: median (min to max)")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = work.tokens / median
        mfu = f"  MFU {rate * flops_per_token(name, work) / peak:.1%}" if peak else ""
        print(f"{name:18} {rate:9.0f}  {median:.3f} ({min(times):.3f} to {max(times):.3f}){mfu}")
    print("\nratio of tokens/s, median over rounds (min to max)")
    for ours, theirs in (
        ("jax_dense", "torch_dense"),
        ("jax_einsum", "torch_moe"),
        ("jax_ragged", "torch_moe"),
        ("jax_einsum", "jax_dense_active"),
        ("jax_ragged", "jax_dense_active"),
    ):
        if {ours, theirs} <= set(seconds):
            ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
            print(
                f"{ours:11} / {theirs:17} {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
                f" {max(ratios):.2f})"
            )


def gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=WORK, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", default="auto", help="ours: compute.kernels")
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="PROGRAM",
        help=f"of {', '.join(PROGRAMS)}; all by default",
    )  # fmt: skip
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
        environment = os.environ | ENVIRONMENTS[args.device]
        if os.environ != environment:  # it is read only at process start
            os.execve(sys.executable, [sys.executable, *sys.argv], environment)
        args.serve = args.profile
        profile(args)
    elif args.matmuls:
        compare_matmuls(args.rounds)
    elif args.serve_matmuls:
        serve_matmuls(args.serve_matmuls)
    elif args.serve:
        serve(args)
    else:
        peak = 0.0
        if args.device == "gpu":
            from btx_jax.costs.chips import chip

            name = gpu_name()
            peak = known.flops if (known := chip(name)) else 0.0
            print(name)
        show(compare(args), WORK[args.device], peak)


if __name__ == "__main__":
    main()
