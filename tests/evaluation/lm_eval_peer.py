"""Log-likelihoods of lm-evaluation-harness's own Hugging Face model beside ours, on the same
requests; by hand, since it needs torch.

    pip install -e '.[lm_eval]' torch transformers accelerate
    python tests/evaluation/lm_eval_peer.py HF_DIRECTORY FILE.jsonl.gz ... [--items=50]
    [--prompt='{query}\\nAnswer:']

For each file of {query, choices, gold}: the largest difference over all choices, and both
accuracies, plain and length-normalised.
"""

import argparse

import jax
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.config import ComputeConfig, TaskConfig
from btx_jax.data.sources import read_json_lines
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.evaluation.likelihood import Scorer
from btx_jax.evaluation.lm_eval_model import BtxJaxLM
from btx_jax.evaluation.tasks import multiple_choice
from btx_jax.parallel.sharding import make_mesh

TOLERANCE = 1e-3


def accuracies(items, log_p):
    right = {"plain": 0, "normalised": 0}
    for item, values in zip(items, log_p, strict=True):
        each = [value / len(choice) for value, choice in zip(values, item["choices"], strict=True)]
        right["plain"] += max(range(len(values)), key=values.__getitem__) == item["gold"]
        right["normalised"] += max(range(len(each)), key=each.__getitem__) == item["gold"]
    return [count / len(items) for count in right.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--prompt", default="{query}\nAnswer:")
    args = parser.parse_args()
    found = find_checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(found.tokenizer)
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    theirs = HFLM(
        pretrained=args.checkpoint,
        dtype="float32",
        batch_size=8,
        device="cpu",
        prefix_token_id=start,
    )
    ours = BtxJaxLM(args.checkpoint)
    mesh = make_mesh((1, 1, 1, 1), jax.local_devices()[:1])
    score = Scorer(found.about.model, load_params(found), ComputeConfig(dtype="float32"), mesh, 8)
    for file in args.files:
        items = read_json_lines(file, "FILE", args.items)
        pairs = [
            (args.prompt.format_map(item), f" {choice}")
            for item in items
            for choice in item["choices"]
        ]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        theirs_log_p, ours_log_p = (
            [p for p, _ in lm.loglikelihood(requests)] for lm in (theirs, ours)
        )
        task = TaskConfig("multiple_choice", file, args.prompt)
        stage = multiple_choice(items, [], task, tokenizer, score, "stage")
        stage_log_p = [p for item in stage["items"] for p in item["log_p"]]
        apart = max(abs(a - b) for a, b in zip(theirs_log_p, ours_log_p, strict=True))
        apart_stage = max(abs(a - b) for a, b in zip(theirs_log_p, stage_log_p, strict=True))
        counts = [len(item["choices"]) for item in items]
        theirs_items = [
            theirs_log_p[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(items))
        ]
        want, got = (
            accuracies(items, theirs_items),
            [stage["accuracy"], stage["accuracy_normalised"]],
        )
        print(
            f"{file}: {len(pairs)} choices, at most {max(apart, apart_stage):.2e} apart; accuracy"
            f" {got}, theirs {want}",
            flush=True,
        )
        assert max(apart, apart_stage) <= TOLERANCE
        assert got == want


if __name__ == "__main__":
    main()
