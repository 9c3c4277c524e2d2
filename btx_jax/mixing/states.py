"""What a model sees inside, layer by layer, with one layer's parameters in memory: a dense one, or
a mixture of which each text passes through one expert. Shape legend: models/layers.py."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from btx_jax.architectures.tensors import EMBEDDING, Reader, TensorId, slots
from btx_jax.config.model_config import ModelConfig
from btx_jax.mixing.text import Rows
from btx_jax.models.attention import Attention
from btx_jax.models.layers import FeedForward, RMSNorm, exact_matmuls

TOKENS_PER_BATCH = 4096

Read = Callable[[TensorId], np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def _block(
    model: ModelConfig, params, x_BTD: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One layer in float32, with one feed-forward, and a shared expert beside it where params have
    one: (its output, what the feed-forward block or router gets)."""

    def apply(module: nn.Module, name: str, *inputs: jax.Array) -> jax.Array:
        y = module.apply({"params": params[name]}, *inputs)
        return cast(jax.Array, y[0] if isinstance(y, tuple) else y)

    norm = RMSNorm(model.norm_eps)
    with exact_matmuls("float32"):
        x_BTD += apply(
            Attention(model), "attention", apply(norm, "attention_norm", x_BTD), segments_BT
        )
        h_BTD = apply(norm, "ffn_norm", x_BTD)
        for name in (part for part in ("ffn", "shared_expert") if part in params):
            biases = tuple(bias for bias in model.biases if f"{bias}_bias" in params[name])
            gated, d_ff = "router" in params[name], params[name]["gate"].shape[1]
            x_BTD += apply(FeedForward(d_ff, biases, gated), name, h_BTD)
        return x_BTD, h_BTD


def token_embeddings(reader: Reader, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[tokens, D] of each prompt, float32."""
    table = reader.read(EMBEDDING)
    return [table[np.asarray(prompt)].astype(np.float32) for prompt in prompts]


def layer_states(
    reader: Reader, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """For each layer, of each prompt: (input of the layer [tokens, D], input of its feed-forward
    block [tokens, D]), float32."""
    model = reader.model
    length = max(map(len, prompts))
    rows = min(len(prompts), max(1, TOKENS_PER_BATCH // length))
    embedded = token_embeddings(reader, prompts)
    batches = []
    for start in range(0, len(prompts), rows):
        x_BTD = np.zeros((rows, length, model.d_model), np.float32)
        segments_BT = np.zeros((rows, length), np.int32)
        for row, states in enumerate(embedded[start : start + rows]):
            x_BTD[row, : len(states)], segments_BT[row, : len(states)] = states, 1
        batches.append((jnp.asarray(x_BTD), jnp.asarray(segments_BT)))

    def unpadded(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
        flat = [row for array in arrays for row in np.asarray(array)]
        return [row[: len(prompt)] for row, prompt in zip(flat, prompts, strict=False)]

    for layer in range(model.layers):
        params = _params(model, reader.read, (t for t in reader.slots if t.layer == layer))
        outputs = [_block(model, params, x, segments) for x, segments in batches]
        yield unpadded([x for x, _ in batches]), unpadded([h for _, h in outputs])
        batches = [
            (output, segments) for (output, _), (_, segments) in zip(outputs, batches, strict=True)
        ]


def forced_states(
    model: ModelConfig, read: Read, texts: Sequence[tuple[int, Rows]]
) -> Iterator[list[np.ndarray]]:
    """For each layer of a mixture, of each text: what the router, or a dense layer's feed-forward,
    gets, [rows, length, D], float32. In mixtures every token of a text passes through one expert,
    with weight 1.

    read: a tensor of the mixture. texts: (expert, its text). In memory: the states of one layer,
    and of its parameters what is no expert's and one expert's.
    """
    table = read(EMBEDDING)
    states = [
        [(jnp.asarray(table[tokens], jnp.float32), segments) for tokens, segments in _batches(rows)]
        for _, rows in texts
    ]
    del table
    for layer in range(model.layers):
        own = [tensor for tensor in slots(model) if tensor.layer == layer]
        common = _params(model, read, (t for t in own if t.expert is None and not t.is_router))
        seen = []
        for number, (expert, _) in enumerate(texts):
            params = common | _params(model, read, (t for t in own if t.expert == expert))
            outputs = [_block(model.dense(), params, *batch) for batch in states[number]]
            segments = [segments for _, segments in states[number]]
            states[number] = [(x, s) for (x, _), s in zip(outputs, segments, strict=True)]
            seen.append(np.concatenate([h for _, h in outputs]))
        yield seen


def _batches(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = max(1, TOKENS_PER_BATCH // rows.tokens_RT.shape[1])
    for start in range(0, len(rows.tokens_RT), step):
        yield rows.tokens_RT[start : start + step], rows.segments_RT[start : start + step]


def _params(model: ModelConfig, read: Read, tensors: Iterable[TensorId]) -> dict[str, Any]:
    """Of one layer, as its modules take them, float32."""
    leaves = {
        tuple(tensor.part.split("/")): jnp.asarray(
            slots(model)[tensor].to_ours(read(tensor)), jnp.float32
        )
        for tensor in tensors
    }
    return dict(unflatten_dict(leaves))
