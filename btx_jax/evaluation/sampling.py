"""Sampling text from a model: greedy, temperature, top-p."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from btx_jax.config import ComputeConfig, ModelConfig
from btx_jax.models.llama import Llama, Params, logits


def sample_token(logits_V: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens whose probabilities reach it (nucleus sampling)."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    scaled = logits_V / temperature
    order = jnp.argsort(-scaled)
    before = jnp.cumsum(jax.nn.softmax(scaled[order])) - jax.nn.softmax(scaled[order])
    kept = jnp.where(before < top_p, scaled[order], -jnp.inf)
    return order[jax.random.categorical(key, kept)]


def generate(
    model: ModelConfig, params: Params, prompt: list[int], new_tokens: int, *,
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, eos: int | None = None,
) -> list[int]:  # fmt: skip
    """The prompt's continuation, at most new_tokens ids, ending before eos. Each token is a forward pass over the whole buffer."""
    length = -(-(len(prompt) + new_tokens) // 64) * 64
    llama = Llama(model, dataclasses.replace(ComputeConfig(dtype="float32", remat="none"), dispatch="ragged"))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, tokens: jax.Array, position: jax.Array, key: jax.Array):
        hidden, _ = llama.apply({"params": params}, tokens, jnp.ones_like(tokens))
        last = jax.lax.dynamic_slice_in_dim(hidden, position - 1, 1, axis=1)
        token = sample_token(logits(params, last)[0, 0], jax.random.fold_in(key, position), temperature, top_p)
        return tokens.at[0, position].set(token.astype(tokens.dtype)), token

    tokens = jnp.zeros((1, length), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt, jnp.int32))
    result: list[int] = []
    for position in range(len(prompt), len(prompt) + new_tokens):
        tokens, token = step(params, tokens, jnp.int32(position), jax.random.key(seed))
        if eos is not None and int(token) == eos:
            break
        result.append(int(token))
    return result
