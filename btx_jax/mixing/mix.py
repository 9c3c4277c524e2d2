"""Mix parameter trees: N dense Llamas become one Mixture-of-Experts (BTX section 3.1). Pure: no
files, no modules, no randomness.

Every leaf belongs to exactly one class: feed-forward leaves become experts, all others are
averaged. All functions run under jit with out_shardings; `mix_leaf` applies the same rule to one
leaf, for models larger than memory.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]

SHARED, EXPERT = "shared", "expert"
_CLASSES = {
    "embed": SHARED,
    "head": SHARED,
    "final_norm": SHARED,
    "attention": SHARED,
    "attention_norm": SHARED,
    "attention_post_norm": SHARED,
    "ffn_norm": SHARED,
    "ffn_post_norm": SHARED,
    "anchor": SHARED,
    "ffn": EXPERT,
    "shared_expert": EXPERT,
}


def leaf_class(path: Sequence[str]) -> str:
    """`shared` or `expert` for a parameter path such as ("layers_0", "ffn", "gate"). Raises
    ValueError for an unknown leaf."""
    part = path[1] if path[0].startswith("layers_") and len(path) > 1 else path[0]
    if part not in _CLASSES:
        raise ValueError(
            f"unknown parameter {'/'.join(path)}: neither a feed-forward leaf nor one that mixing"
            " averages"
        )
    return _CLASSES[part]


def mix_leaf(path: Sequence[str], leaves: Sequence[jax.Array], is_moe: bool = True) -> jax.Array:
    """Make one leaf of the mixture from the same leaf of N models.

    A feed-forward leaf [L, ...] of an MoE run becomes [L, N, ...]; every other leaf becomes the
    mean, computed in float32 and cast back. Values that are equal in all models stay bit-identical,
    which dividing a sum by the count would not guarantee. Raises ValueError, naming the leaf, if
    shapes or dtypes differ.
    """
    kinds = {(leaf.shape, str(leaf.dtype)) for leaf in leaves}
    if len(kinds) > 1:
        raise ValueError(f"{'/'.join(path)} differs between the models: {sorted(kinds)}")
    if leaf_class(path) == EXPERT and is_moe:
        return jnp.stack(leaves, axis=1)
    total = leaves[0].astype(jnp.float32)
    for leaf in leaves[1:]:
        total += leaf.astype(jnp.float32)
    mean = (total / len(leaves)).astype(leaves[0].dtype)
    is_common = functools.reduce(jnp.logical_and, (leaf == leaves[0] for leaf in leaves))
    return jnp.where(is_common, leaves[0], mean)


def mix_params(
    models: Sequence[Params], routers: Mapping[str, jax.Array], shared: Params | None = None
) -> dict[str, Any]:
    """Branch-Train-MiX. models: dense trees of equal structure, in expert order. routers: run name
    -> [L, D, N].

    A run without a router stays dense and is averaged. Call `restack` first if the mixture's runs
    differ from the models'.

    shared: a dense tree whose feed-forwards become shared experts. Their gates start at zero, which
    gives a weight of one half, and the routed experts' down projections are halved exactly, so that
    mixing equal models reproduces the model.

    Raises ValueError, naming the leaf, if the trees differ in structure, shape or dtype, if they
    already contain experts, or if a router does not fit them.
    """
    if not models:
        raise ValueError("no models to mix")
    first, *others = models
    names = _paths(first)
    for i, other in enumerate(others, start=1):
        if difference := set(names) ^ set(_paths(other)):
            raise ValueError(f"model {i} differs from model 0 in {', '.join(sorted(difference))}")
    for run in routers:
        if run not in first:
            raise ValueError(
                f"a router for {run}, but the models' runs are"
                f" {', '.join(r for r in first if r.startswith('layers_'))}"
            )

    def mix(path, *leaves):
        keys = [str(key.key) for key in path]
        if keys[-1] == "router":
            raise ValueError(f"{'/'.join(keys)}: the model is already a mixture; mix dense models")
        return mix_leaf(keys, leaves, keys[0] in routers)

    mixed = jax.tree_util.tree_map_with_path(mix, *models)
    for run, router_LDE in routers.items():
        layers, _, width, _ = mixed[run]["ffn"]["gate"].shape
        if router_LDE.shape != (layers, width, len(models)):
            raise ValueError(
                f"{run}: router {router_LDE.shape}, expected {(layers, width, len(models))}"
            )
        mixed[run]["ffn"]["router"] = router_LDE
        if shared is not None:
            mixed[run]["ffn"]["down"] /= 2
            mixed[run]["shared_expert"] = {
                **shared[run]["ffn"],
                "router": jnp.zeros((layers, width, 1), router_LDE.dtype),
            }
    return mixed


def mix_branches(branches: Sequence[Params]) -> dict[str, Any]:
    """FlexOlmo (arXiv 2507.07024): mix branches that were trained with the same anchor, in expert
    order and of equal structure. Experts, router rows and biases are concatenated; all other
    leaves, including the anchor, are averaged as in `mix_leaf`.

    If nothing else differs, the mixture restricted to one expert and the anchor equals that branch.
    """

    def mix(path, *leaves):
        keys = [str(key.key) for key in path]
        if leaf_class(keys) == SHARED:
            return mix_leaf(keys, leaves)
        return jnp.concatenate(leaves, axis=2 if keys[-1] == "router" else 1)

    return dict(jax.tree_util.tree_map_with_path(mix, *branches))


def upcycle_params(params: Params, copies: int, routers: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Sparse upcycling (arXiv 2212.05055): a mixture of `copies` identical experts."""
    return mix_params([params] * copies, routers)


def restack(params: Params, lengths: Sequence[int]) -> dict[str, Any]:
    """Divide the same dense layers into runs of other lengths: with (1, 31), layers_0 [32, ...]
    becomes layers_0 [1, ...] and layers_1 [31, ...]. Raises ValueError if the lengths do not sum to
    the number of layers."""
    runs = sorted(
        (name for name in params if name.startswith("layers_")),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(params[name] for name in runs))
    layers = jax.tree.leaves(joined)[0].shape[0]
    if sum(lengths) != layers:
        raise ValueError(f"runs of {tuple(lengths)} layers from a model of {layers}")
    result = {name: value for name, value in params.items() if name not in runs}
    start = 0
    for i, length in enumerate(lengths):
        result[f"layers_{i}"] = jax.tree.map(
            lambda leaf, start=start, end=start + length: leaf[start:end], joined
        )
        start += length
    return result


def _paths(params: Params) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
