"""Tokens per second of greedy decoding with a KV cache, compared with `transformers` generate on
the same checkpoint, in alternating rounds.

    pip install -e '.[bench]'
    python benchmarks/decode.py --checkpoint=HF_DIRECTORY [--upcycled=HF_MIXTRAL_DIRECTORY]
    [--dtypes=bfloat16,float32] [--rounds=5]

Both sides use the same dtype for weights and activations, the same prompts of 24 to 40 tokens, a KV
cache, exactly --tokens new tokens per row, all cores, and a separate process (idle threads of one
would slow the other). Rounds include prefill but not compilation. They alternate, so that changes
in the machine's speed affect both sides; the share of equal tokens shows whether both computed the
same. In bfloat16 they diverge sooner or later because sums are rounded in a different order.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

BATCHES = (1, 8)


def prompts_of(batch: int) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        rng.integers(100, 20_000, 24 + 16 * row // max(batch - 1, 1)).tolist()
        for row in range(batch)
    ]


def ours(path: str, dtype: str, new_tokens: int):
    from btx_jax.checkpoints.checkpoint import find_checkpoint, load_for_inference
    from btx_jax.config.config import ComputeConfig
    from btx_jax.evaluation.generation import Generator
    from btx_jax.parallel.sharding import inference_mesh

    found = find_checkpoint(path)
    mesh = inference_mesh(found.metadata.model)
    generator = Generator(
        found.metadata.model,
        load_for_inference(found, mesh, dtype),
        ComputeConfig(dtype=dtype),
        mesh,
    )
    return lambda prompts: generator.generate(prompts, new_tokens)


def theirs(path: str, dtype: str, new_tokens: int):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype)
    ).eval()

    def generate(prompts):
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        )
        with torch.inference_mode():
            ids = model.generate(
                padded,
                attention_mask=mask,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return ids[:, longest:].tolist()

    return generate


def serve(side: str, path: str, dtype: str, new_tokens: int) -> None:
    """For every batch size read from standard input, generate and answer with seconds and
    tokens."""
    generate = {"ours": ours, "theirs": theirs}[side](path, dtype, new_tokens)
    for line in sys.stdin:
        prompts = prompts_of(int(line))
        start = time.perf_counter()
        ids = generate(prompts)
        print(json.dumps([time.perf_counter() - start, ids]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--upcycled", default="")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.checkpoint, args.dtypes, args.tokens)
        return
    for path, dtype in itertools.product(
        filter(None, (args.checkpoint, args.upcycled)), args.dtypes.split(",")
    ):
        command = [
            sys.executable,
            __file__,
            f"--checkpoint={path}",
            f"--dtypes={dtype}",
            f"--tokens={args.tokens}",
        ]
        sides = {
            side: subprocess.Popen(
                [*command, f"--serve={side}"],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for side in ("ours", "theirs")
        }

        def ask(side: str, batch: int, sides=sides):
            print(batch, file=sides[side].stdin, flush=True)
            return json.loads(sides[side].stdout.readline())

        for batch in BATCHES:
            ids = [
                [token for row in ask(side, batch)[1] for token in row] for side in sides
            ]  # compiles and warms up
            same = statistics.mean(a == b for a, b in zip(*ids, strict=True))
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    rates[side].append(batch * args.tokens / ask(side, batch)[0])
            ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
            ours_rate, theirs_rate, ratio = (
                statistics.median(values) for values in (*rates.values(), ratios)
            )
            name = path.rstrip("/").rpartition("/")[2]
            print(
                f"{name}, {dtype}, batch {batch}: {ours_rate:.1f} tokens/s, transformers"
                f" {theirs_rate:.1f}; ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f});"
                f" {100 * same:.1f} % of tokens equal",
                flush=True,
            )
        for process in sides.values():
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
