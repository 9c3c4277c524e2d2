"""What mixing would do to a branch, asked while it trains: its held-out loss where all that mixing
shares is averaged with its seed's."""

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from btx_jax.checkpoints.checkpoint import Checkpoint, load_part
from btx_jax.config.config import TrainConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.mixing.mix import mix_leaf
from btx_jax.models.leaves import is_feed_forward
from btx_jax.models.llama import Params
from btx_jax.models.lora import join, partition
from btx_jax.training.step import in_frozen_dtype

Heldout = Mapping[str, Mapping[str, float]]  # domain -> nats_per_token and others


def is_probed(model: ModelConfig, train: TrainConfig) -> bool:
    """Whether a run measures it: of a dense branch. Where nothing shared moves there is no barrier
    to measure: of LoRA experts, and of branches with frozen shared parts. Beside an anchor a
    branch is no dense one."""
    moves = not (model.moe or model.lora) and train.frozen != "shared"
    return train.mixing_probe and bool(train.eval_every) and moves


def abstract_seed(params: Any, train: TrainConfig) -> Any:
    """What is held of the seed beside a branch of these (abstract) parameters: what mixing shares,
    laid out as the branch's own, in `frozen_dtype`."""
    shared = partition(params, is_feed_forward)[1]
    shapes = jax.eval_shape(lambda tree: in_frozen_dtype(tree, train), shared)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own.sharding), shapes, shared
    )


def make_average(init: Checkpoint, params: Any, train: TrainConfig) -> Callable[[Params], Params]:
    """A branch's parameters -> those that it has when mixed with its seed, init: what mixing shares
    averaged, the feed-forwards its own. params: abstract ones."""
    seed = load_part(init, abstract_seed(params, train))

    def means(branch: Params, seed: Params) -> Params:
        others = flatten_dict(seed)
        return unflatten_dict(
            {
                path: mix_leaf(path, (leaf, others[path].astype(leaf.dtype)))
                for path, leaf in flatten_dict(branch).items()
            }
        )

    averaged = jax.jit(means, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, seed))

    def average(params: Params) -> Params:
        own, shared = partition(params, is_feed_forward)
        return join(own, averaged(shared, seed))

    return average


def barrier(seed: Heldout, branch: Heldout, mixed: Heldout) -> float:
    """How far the average lies above the better of seed and branch, nats per token, the mean over
    all domains: what a mixture of the two that knows whom to ask would lose by the average."""
    return mean(
        average["nats_per_token"] - min(of[domain]["nats_per_token"] for of in (seed, branch))
        for domain, average in mixed.items()
    )
