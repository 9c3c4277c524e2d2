"""What a parameter is, told by its path: which leaves keep float32, which are decayed.

A path is a sequence of names, or of the keys that jax.tree_util gives. `lora.is_adapter` belongs to
LoRA.
"""

from collections.abc import Sequence
from typing import Any

Path = Sequence[Any]


def leaf_name(path: Path) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def is_router(path: Path) -> bool:
    """Whether it is a router of experts, its biases included, or of LoRA experts, or the gate of a
    shared expert."""
    return leaf_name(path) in ("router", "router_bias")


def is_feed_forward(path: Path) -> bool:
    """Whether it is in the part of a layer that mixing makes an expert of, or keeps as a shared
    one, routers included. Mixing shares all other leaves."""
    names = [str(getattr(key, "key", key)) for key in path]
    return "ffn" in names or "shared_expert" in names


def is_anchor(path: Path) -> bool:
    """Whether it is in the feed-forward that all experts started from and share as one
    more expert."""
    return "anchor" in [str(getattr(key, "key", key)) for key in path]


def is_norm_or_bias(path: Path) -> bool:
    """Whether it is the scale of a norm or a bias, which are not decayed."""
    return leaf_name(path).endswith(("scale", "bias"))


def computes_in_float32(path: Path) -> bool:
    """Whether it is the scale of a norm or a router, which compute in float32 whatever dtype
    matmuls have: they are small, a norm divides by what it sums, and rounded logits would choose
    other experts.

    All other leaves without gradient may be held in the dtype of matmuls. So may the embedding: its
    rows are rounded to that dtype when they are looked up.
    """
    return leaf_name(path) == "scale" or is_router(path)


def stays_float32(path: Path) -> bool:
    """Whether it computes in float32 or is the embedding: when trained, because the gradients of a
    token's many positions are summed in its dtype; otherwise, because its rows are rounded when
    they are looked up anyway, and a copy of the table in another dtype would be one more to hold or
    make."""
    return computes_in_float32(path) or leaf_name(path) == "embedding"
