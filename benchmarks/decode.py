"""Tokens per second of greedy decoding with a cache, against `transformers` generate on the same checkpoint, in alternating rounds.

    pip install -e .[bench]
    python benchmarks/decode.py --checkpoint=HF_DIRECTORY [--upcycled=HF_MIXTRAL_DIRECTORY] [--rounds=5]

Both sides: float32, the same prompts of 24 to 40 tokens, a key/value cache, exactly --tokens new tokens a row, all cores. Prefill is
part of a round; compiling is not. The first lines check that both generate the same tokens.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import transformers

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.config import ComputeConfig
from btx_jax.evaluation.generation import Generator
from btx_jax.parallel.sharding import make_mesh


def prompts_of(vocabulary: int, batch: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(100, min(vocabulary, 20_000), 24 + 16 * row // max(batch - 1, 1)).tolist() for row in range(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--upcycled", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    for path in filter(None, (args.checkpoint, args.upcycled)):
        found = find_checkpoint(path)
        ours = Generator(found.about.model, load_params(found), ComputeConfig(dtype="float32"), make_mesh((1, 1, 1, 1)))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for batch in (1, 8):
            prompts = prompts_of(found.about.model.vocab_size, batch)
            longest = max(map(len, prompts))
            padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            exact = {"min_new_tokens": args.tokens, "max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}

            def ours_once(prompts=prompts, ours=ours):
                return ours.generate(prompts, args.tokens)

            def theirs_once(padded=padded, mask=mask, longest=longest, exact=exact, theirs=theirs):
                with torch.inference_mode():
                    return theirs.generate(padded, attention_mask=mask, **exact)[:, longest:].tolist()

            same = np.mean(np.array(ours_once()) == np.array(theirs_once()))
            rates: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.rounds):
                for name, once in (("ours", ours_once), ("theirs", theirs_once)):
                    start = time.perf_counter()
                    once()
                    rates[name].append(batch * args.tokens / (time.perf_counter() - start))
            ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
            ours_rate, theirs_rate, ratio = (statistics.median(values) for values in (*rates.values(), ratios))
            print(
                f"{path.rstrip('/').rpartition('/')[2]}, batch {batch}: {ours_rate:.1f} tokens/s, transformers {theirs_rate:.1f}; ratio "
                f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {100 * same:.1f} % of tokens equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
