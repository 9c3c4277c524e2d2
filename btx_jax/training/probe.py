"""The mixing probe: while a branch trains, measures the held-out loss that it would have if the
parameters that mixing shares were averaged with its seed's."""

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

Heldout = Mapping[str, Mapping[str, float]]  # domain -> nats_per_token and other numbers


def is_probed(model: ModelConfig, train: TrainConfig) -> bool:
    """Whether a run measures the mixing barrier. Only dense branches do: with LoRA experts or
    frozen shared parameters nothing shared changes, so there is no barrier, and a branch with an
    anchor is not dense."""
    moves = not (model.moe or model.lora) and train.frozen != "shared"
    return train.mixing_probe and bool(train.eval_every) and moves


def abstract_seed(params: Any, train: TrainConfig) -> Any:
    """Abstract parameters of the seed to hold in memory alongside a branch: those that mixing
    shares, sharded like the branch's, in `frozen_dtype`. params: abstract parameters of the
    branch."""
    shared = partition(params, is_feed_forward)[1]
    shapes = jax.eval_shape(lambda tree: in_frozen_dtype(tree, train), shared)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own.sharding), shapes, shared
    )


def make_average(init: Checkpoint, params: Any, train: TrainConfig) -> Callable[[Params], Params]:
    """Return a function that takes a branch's parameters and averages the shared ones with its
    seed's, leaving feed-forwards unchanged. init: the seed. params: abstract parameters of the
    branch."""
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
    """How much higher the averaged model's loss is than the lower of seed's and branch's, in nats
    per token, averaged over all domains. This is what averaging costs in a mixture that routes
    perfectly."""
    return mean(
        average["nats_per_token"] - min(of[domain]["nats_per_token"] for of in (seed, branch))
        for domain, average in mixed.items()
    )
