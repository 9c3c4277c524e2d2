"""Write btx_jax/planning/study.json, from which `btx plan` estimates losses. It is made from the
study's evaluations:

    python -m tools.curves runs/paper_small_0/evaluate runs/paper_small_1/evaluate ...
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btx_jax.models.llama import parameter_counts
from btx_jax.planning import expected
from btx_jax.presets.experiments import SHARES
from btx_jax.presets.study import MIXTURE_COST, MODEL, SEED_STEPS, TOKENS, paper_small
from btx_jax.reporting.compare import mean_loss

FILE = Path(expected.__file__).parent / "study.json"
DENSE = ("dense", "dense_flops", "dense_time")
UPCYCLING = ("upcycling_tokens", "upcycling_flops", "upcycling_time")
# At 100 % the mixture is not finetuned.
PIPELINE = paper_small("all").pipeline or {}
SPLIT = ("btx", *(f"share_{share}" for share in SHARES if share < 100))


def made(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The contents of study.json. seeds: the models of each seed value's results.json."""
    evaluate = PIPELINE["evaluate"].config.evaluate
    assert evaluate
    arms = []
    for name in (*DENSE, *UPCYCLING, *SPLIT):
        dense, mixture = _spent(evaluate.models[name])
        arms.append(
            {"name": name, "dense": dense, "mixture": mixture, "gains": _gains(seeds, name)}
        )
    parameters, seed_tokens = parameter_counts(MODEL)[0], SEED_STEPS * TOKENS
    return {"parameters": parameters, "seed_tokens": seed_tokens, "arms": arms}


def _spent(path: str) -> tuple[int, int]:
    """FLOPs spent between the seed and the stage `@NAME`, as tokens of the dense model: (in dense
    training and branches, in a mixture)."""
    name = path.removeprefix("@")
    config = PIPELINE[name].config
    if name == "seed":
        return 0, 0
    if config.mix:
        parts = [_spent(expert) for expert in config.mix.experts]
        return sum(dense for dense, _ in parts), 0
    assert config.train
    dense, mixture = _spent(config.init)
    tokens = config.train.steps * TOKENS
    if PIPELINE[config.init.removeprefix("@")].config.mix:
        return dense, mixture + round(tokens * MIXTURE_COST)
    return dense + tokens, mixture


def _gains(seeds: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [
        round(1 - mean_loss(models[name]) / mean_loss(models["seed"]), 5)
        for models in seeds
        if name in models
    ]


def write(evaluations: Sequence[str]) -> None:
    seeds = [
        json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["models"]
        for folder in evaluations
    ]
    FILE.write_text(json.dumps(made(seeds), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
