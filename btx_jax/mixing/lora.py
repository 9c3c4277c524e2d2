"""Mix LoRA branches of one base into a mixture of LoRA experts: BTX with adapters. Pure, on tensors
named as in checkpoints/adapter.py: `layers.LAYER.TARGET.{a [E, R, I], b [E, O, R], router [E,
I]}`."""

from collections.abc import Mapping, Sequence

import numpy as np

Tensors = Mapping[str, np.ndarray]


def mix_lora(
    branches: Sequence[Tensors], router_std: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Concatenate the experts of all branches.

    If all branches have router rows (gates trained with finished experts), these stay with their
    experts; otherwise routers are new, normal with router_std. Raises ValueError, naming the
    tensor, if the branches adapt different maps or their shapes differ in more than the number of
    experts.
    """
    maps = [sorted(name[:-2] for name in branch if name.endswith(".a")) for branch in branches]
    for number, names in enumerate(maps[1:], start=1):
        if difference := set(names) ^ set(maps[0]):
            raise ValueError(
                f"branch {number} adapts different maps from branch 0:"
                f" {', '.join(sorted(difference)[:4])}"
            )
    mixed: dict[str, np.ndarray] = {}
    for name in maps[0]:
        for part in "ab":
            tensors = [branch[f"{name}.{part}"] for branch in branches]
            if len(shapes := {tensor.shape[1:] for tensor in tensors}) > 1:
                raise ValueError(f"{name}.{part} differs between the branches: {sorted(shapes)}")
            mixed[f"{name}.{part}"] = np.concatenate(tensors)
        rows = [branch.get(f"{name}.router") for branch in branches]
        experts, _, inputs = mixed[f"{name}.a"].shape
        fresh = rng.normal(0, router_std, (experts, inputs)).astype(np.float32)
        mixed[f"{name}.router"] = (
            fresh
            if any(row is None for row in rows)
            else np.concatenate([row for row in rows if row is not None])
        )
    return mixed
