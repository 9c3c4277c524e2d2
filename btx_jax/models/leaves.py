"""Properties of a parameter derived from its path, such as whether it stays float32 or is decayed.

A path is a sequence of names, or of the keys of jax.tree_util. For LoRA see `lora.is_adapter`.
"""

from collections.abc import Sequence
from typing import Any

Path = Sequence[Any]


def leaf_name(path: Path) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def is_router(path: Path) -> bool:
    """Whether it is a router of experts (or its bias), a router of LoRA experts, or the gate of a
    shared expert."""
    return leaf_name(path) in ("router", "router_bias")


def is_feed_forward(path: Path) -> bool:
    """Whether it belongs to the part of a layer that mixing turns into an expert, or keeps as a
    shared expert, routers included. Mixing averages all other leaves."""
    names = [str(getattr(key, "key", key)) for key in path]
    return "ffn" in names or "shared_expert" in names


def is_anchor(path: Path) -> bool:
    """Whether it belongs to the anchor: the feed-forward that all experts started from, kept as one
    more expert."""
    return "anchor" in [str(getattr(key, "key", key)) for key in path]


def is_norm_or_bias(path: Path) -> bool:
    """Whether it is a norm's scale or a bias, neither of which is decayed."""
    return leaf_name(path).endswith(("scale", "bias"))


def computes_in_float32(path: Path) -> bool:
    """Whether it is a norm's scale or a router. These compute in float32 whatever the matmul dtype:
    they are small, norms divide by a sum, and rounded logits would choose other experts.

    All other leaves that get no gradient may be stored in the matmul dtype, even the embedding,
    whose rows are rounded to that dtype on lookup.
    """
    return leaf_name(path) == "scale" or is_router(path)


def stays_float32(path: Path) -> bool:
    """Whether it computes in float32 or is the embedding. A trained embedding accumulates the
    gradients of all occurrences of a token in its own dtype. A frozen one is rounded on lookup
    anyway, and a second copy of the table would only cost memory."""
    return computes_in_float32(path) or leaf_name(path) == "embedding"
