"""FLOPs of training a model, computed from formulas without compiling."""

import math
from collections.abc import Callable

from btx_jax.config.model_config import ModelConfig
from btx_jax.models.leaves import is_router
from btx_jax.models.llama import leaf_counts
from btx_jax.models.lora import is_adapter

Path = tuple[str, ...]
IsTrained = Callable[[Path], bool]  # whether the parameter at this path is trained
Place = tuple[float, float]  # (layer, index into ROWS), ordered as in the forward pass

# The parameters of a layer in the order of its forward pass. Those in one row share their input.
ROWS = (
    ("attention_norm",),
    ("query", "key", "value", "query_norm", "key_norm", "q", "k", "v"),
    ("out", "o"),
    ("attention_post_norm",),
    ("ffn_norm",),
    ("gate", "up", "router"),
    ("down",),
    ("ffn_post_norm",),
)
SCORES = 2.0  # place of the attention scores: computed from row 1, input of row 2 (`out`)


def everything(_: Path) -> bool:
    return True


def train_flops(config: ModelConfig, tokens: int, is_trained: IsTrained = everything) -> float:
    """FLOPs of training, without attention scores and rematerialisation: tokens times the sum over
    all active parameters of

        2 (forward)  +  2 if it is trained  +  2 if a parameter below it is trained.

    The backward pass of a matmul consists of two more matmuls of the same size. One computes the
    gradient of the weight, which frozen weights do not need; the other computes the gradient of the
    input, which is needed only if trained parameters contributed to that input. Backpropagation
    stops at the lowest trained parameter.

    The embedding counts as a matmul with its table, as in 6 N D, although it is a lookup. With all
    parameters trained, FLOPs per token are 6 x active parameters; with frozen experts, 4 x the
    experts' and 6 x the others; with a frozen base under LoRA experts, or with frozen shared parts,
    4 x the frozen and 6 x the others, minus the part of layer 0 whose input gradient is not needed.
    """
    return tokens * sum(flops_by_leaf(config, is_trained).values())


def flops_by_leaf(config: ModelConfig, is_trained: IsTrained = everything) -> dict[Path, float]:
    """Path of a parameter -> its share of `train_flops`, for one token."""
    lowest, flops = _lowest(config, is_trained), {}
    for path, (_, active) in leaf_counts(config).items():
        entered = [enters for enters, _ in _places(config, path)]
        passed = sum(lowest < place for place in entered) / len(entered)
        flops[path] = active * (2.0 + 2.0 * is_trained(path) + 2.0 * passed)
    return flops


def attention_flops(
    config: ModelConfig, tokens: int, length: int, is_trained: IsTrained = everything
) -> float:
    """FLOPs of the scores and weighted sums of causal attention over full sequences of this length:
    the forward pass, and the backward pass of the layers that `train_flops` backpropagates through.
    A token attends to half of the sequence on average; with a window, to the whole window except at
    the beginning of the sequence."""
    lowest, seen = _lowest(config, is_trained), 0.0
    for layer, spec in enumerate(config.layer_specs()):
        window = min(spec.window or length, length)
        passes = 12.0 if lowest < (layer, SCORES) else 4.0
        seen += passes * window * (1 - window / (2 * length))
    return seen * config.heads * config.head_dim * tokens


def _lowest(config: ModelConfig, is_trained: IsTrained) -> Place:
    """The place of the lowest trained parameter."""
    trained = filter(is_trained, leaf_counts(config))
    acts = (acts for path in trained for _, acts in _places(config, path))
    return min(acts, default=(math.inf, 0.0))


def _places(config: ModelConfig, path: Path) -> list[tuple[Place, Place]]:
    """For each layer of a leaf: (place of its input, place at which its output takes effect)."""
    top = float(config.layers)
    if path[0] == "embed":
        table = (-1.0, 0.0)
        return [((top, 1.0) if config.tied_head else table, (-2.0, 0.0))]
    if path[0] in ("final_norm", "head"):
        place = (top, float(path[0] == "head"))
        return [(place, place)]
    names = [name.removesuffix("_bias") for name in path[1:]]
    row = next(float(i) for name in names for i, row in enumerate(ROWS) if name in row)
    acts = row
    if is_router(path):
        acts = row + 0.5  # its gates scale the input of B or of the down matmul
    elif is_adapter(path) and path[-1] == "b":
        row = acts = row + 0.75  # after A and the router
    first = 0
    for name, length, _ in config.runs():
        if name == path[0]:
            break
        first += length
    return [((layer, row), (layer, acts)) for layer in range(first, first + length)]
