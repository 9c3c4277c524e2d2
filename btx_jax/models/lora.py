"""LoRA experts on a linear map (MoLA, arXiv 2402.08562, equation 7). Shape legend: layers.py, and

  I, O the map's inputs and outputs  R rank

The A matrices of all experts form one matmul, the B matrices another, with the gates in between.
Experts that a token does not use are multiplied by zero: at these ranks that costs less than moving
tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from btx_jax.config.model_config import LoRASpec
from btx_jax.models.routing import RoutingStats
from btx_jax.parallel.sequence import TOKENS, exchanged
from btx_jax.parallel.sharding import all_gather, psum

NAME = "lora"  # name of the sub-tree that holds a module's adapters, by target

# target -> logical axes of the map's inputs and outputs
PLACES = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "hidden"),
    "up": ("embed", "hidden"),
    "down": ("hidden", "embed"),
}

Adapter = Mapping[str, jax.Array]  # a [I, E, R], b [E, R, O]; router [I, E] if routed


def is_adapter(path: Sequence[str]) -> bool:
    """Whether a path belongs to the LoRA experts."""
    return NAME in path


def partition(
    params: Mapping[str, Any], keep: Callable[[tuple[str, ...]], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into (those whose path `keep` accepts, the others). `join` is the
    inverse."""
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flatten_dict(params).items():
        parts[not keep(path)][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform within +-1 / sqrt(inputs), PyTorch's initialisation of a Linear (a = sqrt(5)). The
    first axis of `shape` is the inputs."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def adapter_params(
    module: nn.Module, spec: LoRASpec | None, widths: Mapping[str, tuple[int, int]]
) -> dict[str, Adapter]:
    """Create the adapters of those of spec's targets that are in widths (target -> I, O). B starts
    at zero, so that the model is initially unchanged."""
    if spec is None:
        return {}
    targets = {target: widths[target] for target in spec.targets if target in widths}

    def init(key: jax.Array) -> dict[str, Any]:
        made = {}
        for number, (target, (inputs, outputs)) in enumerate(targets.items()):
            into, out = PLACES[target]
            key_a, key_router = jax.random.split(jax.random.fold_in(key, number))
            uniform = lambda names: nn.with_logical_partitioning(kaiming_uniform, names)  # noqa: E731
            zeros = nn.with_logical_partitioning(
                lambda _, shape: jnp.zeros(shape), ("lora_expert", "rank", out)
            )
            made[target] = {
                "a": uniform((into, "lora_expert", "rank"))(
                    key_a, (inputs, spec.experts, spec.rank)
                ),
                "b": zeros(key, (spec.experts, spec.rank, outputs)),
            }
            if spec.has_router:
                made[target]["router"] = uniform((into, "router"))(
                    key_router, (inputs, spec.experts)
                )
        return made

    return module.param(NAME, init) if targets else {}


class Cut(NamedTuple):
    """A module's adapters as arguments of `shard_map`: the arrays, the logical axes of each, and a
    function that rebuilds the adapters from shards. routed: the targets that have a router."""

    arrays: tuple[jax.Array, ...]
    names: tuple[tuple[str | None, ...], ...]
    routed: tuple[str, ...]
    restore: Callable[[Sequence[jax.Array]], dict[str, dict[str, jax.Array]]]


def cut(
    module: nn.Module,
    spec: LoRASpec | None,
    adapters: Mapping[str, Adapter],
    rows: tuple[int, ...],
    dtype: Any,
) -> Cut:
    """Flatten adapters for `shard_map`.

    rows: (B, T) of the activations that the adapters will be applied to. With a "dropout" rng,
    every target also gets its own mask [B, T, I], as in peft; it is drawn here so that it does not
    depend on the mesh.
    """
    trees: dict[str, dict[str, jax.Array]] = {}
    names: dict[str, dict[str, tuple[str | None, ...]]] = {}
    key = (
        module.make_rng("dropout")
        if spec and spec.dropout and adapters and module.has_rng("dropout")
        else None
    )
    for number, (target, adapter) in enumerate(adapters.items()):
        assert spec is not None
        into, out = PLACES[target]
        trees[target] = {
            name: x if name == "router" else x.astype(dtype) for name, x in adapter.items()
        }
        places = {
            "a": (into, None, None),
            "b": (None, None, out),
            "router": (into, None),
            "mask": (*TOKENS, into),
        }
        if key is not None:
            inputs = adapter["a"].shape[0]
            kept_BTI = jax.random.bernoulli(
                jax.random.fold_in(key, number), 1 - spec.dropout, (*rows, inputs)
            )
            trees[target]["mask"] = exchanged(kept_BTI)
            places["mask"] = (
                *TOKENS,
                None if into == "embed" else into,
            )  # activations are not sharded along D
        names[target] = {name: places[name] for name in trees[target]}
    arrays, structure = jax.tree.flatten(trees)
    flat_names = tuple(
        names[target][name] for target in sorted(names) for name in sorted(names[target])
    )
    routed = tuple(target for target in trees if "router" in trees[target])
    return Cut(
        tuple(arrays), flat_names, routed, lambda arrays: jax.tree.unflatten(structure, arrays)
    )


def adapt(
    target: str, adapter: Adapter, x_BTI: jax.Array, spec: LoRASpec
) -> tuple[jax.Array, jax.Array | None]:
    """The experts' contribution on one device: (addition to the map's output [B, T, O] in x's
    dtype, router logits [B, T, E] in float32 or None)."""
    into, out = PLACES[target]
    a_IER, b_ERO = adapter["a"], adapter["b"]
    a_IER = all_gather(a_IER, "embed", 0) if into == "embed" else a_IER
    b_ERO = all_gather(b_ERO, "embed", 2) if out == "embed" else b_ERO

    def whole(x: jax.Array) -> jax.Array:
        """Sum over the devices that share I."""
        return x if into == "embed" else psum(x, into)

    dropped = x_BTI
    if "mask" in adapter:
        dropped = jnp.where(adapter["mask"], x_BTI / (1 - spec.dropout), 0)
    rows = x_BTI.shape[:2]
    z_ME = whole(dropped.reshape(-1, x_BTI.shape[-1]) @ a_IER.reshape(a_IER.shape[0], -1))
    logits_BTE = None
    if "router" in adapter:
        router_IE = (
            all_gather(adapter["router"], "embed", 0) if into == "embed" else adapter["router"]
        )
        logits_ME = (
            _cosine_logits(x_BTI, router_IE, whole)
            if spec.gating == "cosine"
            else whole(_dot(x_BTI, router_IE))
        )
        gate_ME = gates(logits_ME, spec) * spec.scale
        z_ME = (
            z_ME.reshape(*gate_ME.shape, spec.rank) * gate_ME[..., None].astype(z_ME.dtype)
        ).reshape(z_ME.shape)
        logits_BTE = logits_ME.reshape(*rows, spec.experts)
    else:
        z_ME *= spec.scale
    return (z_ME @ b_ERO.reshape(-1, b_ERO.shape[-1])).reshape(*rows, -1), logits_BTE


class Adapted:
    """A module's adapters on one device. logits: target -> router logits [B, T, E], for the routers
    applied so far."""

    def __init__(self, spec: LoRASpec | None, adapters: Mapping[str, Adapter]):
        self._spec, self._adapters = spec, adapters
        self.logits: dict[str, jax.Array] = {}

    def plus(self, target: str, x_BTI: jax.Array, y_BTO: jax.Array) -> jax.Array:
        """The map's output y plus the experts' contribution; y itself if the map is not adapted."""
        if target not in self._adapters:
            return y_BTO
        assert self._spec is not None
        delta_BTO, logits_BTE = adapt(target, self._adapters[target], x_BTI, self._spec)
        if logits_BTE is not None:
            self.logits[target] = logits_BTE
        return y_BTO + delta_BTO


def _dot(x_BTI: jax.Array, router_IE: jax.Array) -> jax.Array:
    return jnp.matmul(
        x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32),
        router_IE.astype(jnp.float32),
        precision="highest",
    )


def _cosine_logits(
    x_BTI: jax.Array, router_IE: jax.Array, whole: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Router logits [M, E]: sqrt(I) times the cosine between x and each expert's router row, both
    centred (PHATGOOSE, section 3.2). Zero padding gives 0."""
    x_MI = x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32)
    w_IE = router_IE.astype(jnp.float32)
    size = whole(jnp.full((), x_MI.shape[-1], jnp.float32))
    sum_M, sum_E = whole(x_MI.sum(1)), whole(w_IE.sum(0))
    square_M, square_E = (
        whole((x_MI**2).sum(1)) - sum_M**2 / size,
        whole((w_IE**2).sum(0)) - sum_E**2 / size,
    )
    dot_ME = whole(_dot(x_BTI, router_IE)) - sum_M[:, None] * sum_E / size
    norms = jnp.sqrt(jnp.maximum(square_M[:, None] * square_E, jnp.finfo(jnp.float32).tiny))
    return jnp.sqrt(size) * dot_ME / norms


def chosen(logits_ME: jax.Array, k: int) -> jax.Array:
    """Mask of the k largest logits along the last axis; ties go to the lower index. Uses pairwise
    comparisons, since sorting a few numbers is slower."""
    earlier = jnp.arange(logits_ME.shape[-1])[:, None] > jnp.arange(
        logits_ME.shape[-1]
    )  # [expert, rival]
    a, b = logits_ME[..., :, None], logits_ME[..., None, :]
    return ((b > a) | ((b == a) & earlier)).sum(-1) < k


def gates(logits_ME: jax.Array, spec: LoRASpec) -> jax.Array:
    """Weight of each expert, float32, in the shape of the logits; with softmax gating 0 for experts
    that are not chosen."""
    if spec.gating == "sigmoid":
        return jax.nn.sigmoid(logits_ME)
    return jax.nn.softmax(jnp.where(chosen(logits_ME, spec.k), logits_ME, -jnp.inf))


def router_statistics(logits_BTE: jax.Array, valid_BT: jax.Array, spec: LoRASpec) -> RoutingStats:
    """Statistics of one router over the valid tokens. balance_loss: E sum_i f_i P_i, with f the
    share of choices (without gradient) and P the mean probability, as in Switch and MoLA; 1 when
    uniform."""
    tokens = jnp.maximum(valid_BT.sum(), 1)
    mean = lambda x_BTE: jnp.where(valid_BT[..., None], x_BTE, 0).sum((0, 1)) / tokens  # noqa: E731
    probs_BTE = jax.nn.softmax(logits_BTE)
    load_E = mean(chosen(logits_BTE, spec.k).astype(jnp.float32)) / spec.k
    log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    return RoutingStats(
        load_E=load_E,
        gate_load_E=mean(gates(logits_BTE, spec)),
        entropy=mean((log_z_BT - (probs_BTE * logits_BTE).sum(-1))[..., None])[0],
        dropped=jnp.zeros(()),
        balance_loss=spec.experts * (load_E * mean(probs_BTE)).sum(),
        z_loss=mean((log_z_BT**2)[..., None])[0],
    )
