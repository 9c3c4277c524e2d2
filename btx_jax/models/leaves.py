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
    """Of experts, their biases too, of LoRA experts, or the gate of a shared expert."""
    return leaf_name(path) in ("router", "router_bias")


def is_feed_forward(path: Path) -> bool:
    """Of the part of a layer that mixing makes an expert of, or keeps as a shared one; their
    routers too. All other leaves mixing shares."""
    names = [str(getattr(key, "key", key)) for key in path]
    return "ffn" in names or "shared_expert" in names


def is_anchor(path: Path) -> bool:
    """Of the feed-forward that all experts started from and share as one more expert."""
    return "anchor" in [str(getattr(key, "key", key)) for key in path]


def is_norm_or_bias(path: Path) -> bool:
    """The scales of norms and what is added to a map's answers, for which weight decay has no
    use."""
    return leaf_name(path).endswith(("scale", "bias"))


def computes_in_float32(path: Path) -> bool:
    """Scales of norms and routers, whatever dtype matmuls have: they are small, a norm divides by
    what it sums, and rounded logits would choose other experts.

    All else may be held in the dtype of matmuls where it gets no gradient. So may the embedding:
    its rows are rounded to that dtype when they are taken.
    """
    return leaf_name(path) == "scale" or is_router(path)


def stays_float32(path: Path) -> bool:
    """These and the embedding: where it is trained, since the gradients of a token's many places
    are summed in its dtype; and where its rows are rounded anyway when they are taken, and a copy
    of the table in another dtype would be one more to hold or make."""
    return computes_in_float32(path) or leaf_name(path) == "embedding"
