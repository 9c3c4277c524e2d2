"""What a dense model sees inside, layer by layer, with one layer's parameters in memory. Shape
legend: models/layers.py."""

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from btx_jax.architectures.tensors import EMBEDDING, Reader, TensorId
from btx_jax.config.model_config import ModelConfig
from btx_jax.models.attention import Attention
from btx_jax.models.layers import FeedForward, RMSNorm, exact_matmuls

TOKENS_PER_BATCH = 4096


@functools.partial(jax.jit, static_argnums=0)
def _block(
    model: ModelConfig, params, x_BTD: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One dense layer in float32: (its output, what its feed-forward block or router gets)."""

    def apply(module: nn.Module, name: str, *inputs: jax.Array) -> jax.Array:
        y = module.apply({"params": params[name]}, *inputs)
        return cast(jax.Array, y[0] if isinstance(y, tuple) else y)

    norm = RMSNorm(model.norm_eps)
    with exact_matmuls("float32"):
        x_BTD += apply(
            Attention(model), "attention", apply(norm, "attention_norm", x_BTD), segments_BT
        )
        h_BTD = apply(norm, "ffn_norm", x_BTD)
        return x_BTD + apply(FeedForward(model.d_ff, model.biases), "ffn", h_BTD), h_BTD


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
    by_layer: dict[int, list[TensorId]] = {}
    for tensor in reader.slots:
        if tensor.layer is not None:
            by_layer.setdefault(tensor.layer, []).append(tensor)

    def unpadded(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
        flat = [row for array in arrays for row in np.asarray(array)]
        return [row[: len(prompt)] for row, prompt in zip(flat, prompts, strict=False)]

    for tensors in by_layer.values():
        leaves: dict[tuple[str, ...], jax.Array] = {}
        for tensor in tensors:
            slot = reader.slots[tensor]
            array = jnp.asarray(slot.to_ours(reader.read(tensor)), jnp.float32)
            leaves[tuple(tensor.part.split("/"))] = array
        params = unflatten_dict(leaves)
        outputs = [_block(model, params, x, segments) for x, segments in batches]
        yield unpadded([x for x, _ in batches]), unpadded([h for _, h in outputs])
        batches = [
            (output, segments) for (output, _), (_, segments) in zip(outputs, batches, strict=True)
        ]
