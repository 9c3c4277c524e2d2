"""Generate text with a KV cache, for a batch of prompts of unequal length: greedily, or sampled
with temperature and top-p. Shape legend: models/decoding.py."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import check_ids
from btx_jax.models.decoding import Cache, empty_cache, forward, next_logits, unstack
from btx_jax.models.layers import on_mesh
from btx_jax.models.llama import Params
from btx_jax.parallel.hosts import put
from btx_jax.parallel.sharding import batch_sharding, replicated, shard

BUCKET = 16  # prompts and caches are padded to a multiple, so that few shapes are compiled
CHUNK = 32  # tokens to generate between two checks of which texts have ended


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens whose probabilities reach it
    (nucleus sampling)."""

    temperature: float = 0.0
    top_p: float = 1.0


def _argmax(values_V: jax.Array) -> jax.Array:
    """Index of the first of the largest values, found block by block: XLA's CPU backend is fast at
    a maximum, but finds its index in a loop over single values."""
    blocks = jnp.pad(values_V, (0, -len(values_V) % 128), constant_values=-jnp.inf).reshape(-1, 128)
    block = jnp.argmax(blocks.max(axis=1))
    return (block * 128 + jnp.argmax(blocks[block])).astype(jnp.int32)


def sample_token(logits_V: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return _argmax(logits_V)
    scaled = logits_V / sampling.temperature
    if sampling.top_p == 1:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    order = jnp.argsort(-scaled)
    before = jnp.cumsum(jax.nn.softmax(scaled[order])) - jax.nn.softmax(scaled[order])
    kept = jnp.where(before < sampling.top_p, scaled[order], -jnp.inf)
    return order[jax.random.categorical(key, kept)].astype(jnp.int32)


class Generator:
    """Continues prompts. Keeps a second copy of the parameters, layer by layer.

    mesh: over which batches are sharded; their size must be divisible by its data, fsdp and expert
    axes. stops: ids that end a text.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        compute: ComputeConfig,
        mesh: Mesh,
        stops: Sequence[int] = (),
    ):
        self.context = model.context
        self._model, self._mesh, self._stops = model, mesh, tuple(stops) or (-1,)
        self._compute = dataclasses.replace(compute, dispatch="ragged", remat="none")
        with jax.set_mesh(mesh):
            self._weights = jax.jit(
                functools.partial(
                    unstack, model=model, dtype=compute.dtype, one_device=mesh.size == 1
                )
            )(params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        is_finished: Callable[[int, list[int]], bool] = lambda row, ids: False,
    ) -> list[list[int]]:
        """The continuation of each prompt: at most new_tokens ids. It ends before one of stops, or
        once is_finished(row, its continuation so far) is true, which is called every CHUNK tokens.
        What is sampled for a row does not depend on the others. Raises UserError for an id without
        an embedding.

        Longrope rotates texts longer than its original context by different factors, which changes
        the whole cache: a row that grows beyond that context is processed again from its beginning,
        as in transformers. With dynamic RoPE the cache stays as it was rotated, also as in
        transformers.
        """
        check_ids((max(prompt) for prompt in prompts if prompt), self._model.vocab_size, "prompt")
        scaling = self._model.rope_scaling
        # A row that has just filled the original context still draws one token with short factors.
        room = [scaling.original_context + 1 - len(prompt) for prompt in prompts]
        crossing = [0 < left < new_tokens for left in room]
        if scaling.kind != "longrope" or not any(crossing):
            return self._generate(prompts, new_tokens, sampling, seed, is_finished)
        limits = [
            left if crosses else new_tokens for left, crosses in zip(room, crossing, strict=True)
        ]
        first = self._generate(prompts, max(limits), sampling, seed, is_finished, limits)
        stopped = [
            not crosses or len(ids) < limit or is_finished(row, ids)
            for row, (crosses, ids, limit) in enumerate(zip(crossing, first, limits, strict=True))
        ]
        rest = self._generate(
            [[*prompt, *ids] for prompt, ids in zip(prompts, first, strict=True)],
            new_tokens - min(limits),
            sampling,
            seed,
            lambda row, ids: is_finished(row, [*first[row], *ids]),
            [
                0 if stop else new_tokens - limit
                for stop, limit in zip(stopped, limits, strict=True)
            ],
        )
        return [[*ids, *more] for ids, more in zip(first, rest, strict=True)]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        seed: int,
        is_finished: Callable[[int, list[int]], bool],
        limits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """`generate` without recomputing the cache for longrope. limits: maximum number of new
        tokens of each row."""
        limits = limits or [new_tokens] * len(prompts)
        batch, longest = len(prompts), max(map(len, prompts))
        width = -(-longest // BUCKET) * BUCKET
        slots = -(-(longest + new_tokens) // BUCKET) * BUCKET
        start, proceed = _programs(
            self._model,
            self._compute,
            self._mesh,
            self._stops,
            batch,
            width,
            max(slots, width),
            sampling,
        )
        tokens = np.zeros((batch, width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        rows = batch_sharding(self._mesh)
        with on_mesh(self._mesh, self._compute.dtype):
            seed_word = np.uint32(seed)
            lengths = np.array([len(prompt) for prompt in prompts], np.int32)
            token_B, cache = start(self._weights, put(tokens, rows), put(lengths, rows), seed_word)
            results: list[list[int]] = [[] for _ in prompts]
            done = np.array([limit == 0 for limit in limits])
            for first in range(0, new_tokens, CHUNK):
                left = new_tokens - first
                steps = np.int32(left - 1 if left <= CHUNK else CHUNK)  # none after the last token
                new_BC, token_B, cache = proceed(
                    self._weights,
                    token_B,
                    put(done, replicated(self._mesh)),
                    cache,
                    seed_word,
                    steps,
                )
                for row, ids in enumerate(np.asarray(new_BC)[:, :left].tolist()):
                    if done[row]:
                        continue
                    end = next((i for i, token in enumerate(ids) if token in self._stops), len(ids))
                    kept = ids[: min(end, limits[row] - len(results[row]))]
                    results[row] += kept
                    done[row] = len(kept) < len(ids) or is_finished(row, results[row])
                if done.all():
                    break
        return results


@functools.lru_cache(maxsize=64)
def _programs(
    model: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    stops: tuple[int, ...],
    batch: int,
    width: int,
    slots: int,
    sampling: Sampling,
) -> tuple[Any, Any]:
    """The jitted programs (start, proceed), cached by shapes and not by parameters, because a model
    in training generates again and again. mesh: the mesh under which they are traced."""
    row_B = jnp.arange(batch)

    def draw(weights, hidden_BD, seed, position_B):
        key, logits_BV = jax.random.key(seed), next_logits(model, weights, hidden_BD)
        key_B = jax.vmap(
            lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
        )(row_B, position_B)
        return jax.vmap(lambda values, key: sample_token(values, key, sampling))(logits_BV, key_B)

    @jax.jit
    def start(weights, tokens_BT, length_B, seed):
        cache = empty_cache(model, compute.dtype, batch, slots)
        hidden_BD, cache = forward(model, compute, weights, tokens_BT, length_B, cache)
        return draw(weights, hidden_BD, seed, cache.length_B), cache

    @functools.partial(jax.jit, donate_argnums=3)
    def proceed(weights, token_B, done_B, cache: Cache, seed, steps):
        """Start from a known token and take one step per token, at most CHUNK; stop early when
        every row has ended. Also returns the last tokens."""

        def wanted(state):
            i, _, _, done_B, _ = state
            return (i < steps) & ~done_B.all()

        def body(state):
            i, new_BC, token_B, done_B, cache = state
            new_BC = new_BC.at[:, i].set(token_B)
            done_B = done_B | jnp.isin(token_B, jnp.array(stops))
            hidden_BD, cache = forward(
                model,
                compute,
                weights,
                token_B[:, None],
                1 - done_B.astype(jnp.int32),
                cache,
            )
            return (
                i + 1,
                new_BC,
                draw(weights, hidden_BD, seed, cache.length_B),
                done_B,
                cache,
            )

        empty_BC = jnp.full((batch, CHUNK), stops[0], jnp.int32)
        i, new_BC, token_B, _, cache = jax.lax.while_loop(
            wanted, body, (jnp.int32(0), empty_BC, token_B, done_B, cache)
        )
        new_BC = new_BC.at[:, i].set(token_B, mode="drop")
        return shard(new_BC, None, None), token_B, cache  # every process reads all rows

    return start, proceed
