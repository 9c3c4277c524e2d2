"""Log-likelihood of continuations, in batches of similar length. Shape legend: models/layers.py."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import Tokenizer, check_ids
from btx_jax.models.layers import Readout, on_mesh
from btx_jax.models.llama import Llama, Params, head_kernel
from btx_jax.parallel.hosts import is_first, put
from btx_jax.parallel.sharding import batch_sharding, replicated
from btx_jax.progress import bar
from btx_jax.terminal import counted
from btx_jax.training.losses import token_scores

BUCKET = 64  # widths are multiples of it, to compile few shapes


class Likelihood(NamedTuple):
    """Result for a continuation: sum of its tokens' log-probabilities in nats, and whether greedy
    decoding would have produced it."""

    log_p: float
    is_greedy: bool


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of both, split at the end of the context's own tokens; its trailing spaces belong
    to the continuation, as tokenizers expect (the rule of lm-evaluation-harness). An empty context
    is replaced by the beginning of a document: BOS, or else EOS."""
    if not context:
        start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        return [start] if start is not None else [], tokenizer.encode(continuation)
    stripped = context.rstrip()
    ids = tokenizer.encode_prompt(stripped)
    whole = tokenizer.encode_prompt(context + continuation)
    return ids, whole[len(ids) :]


class Scorer:
    """Log-likelihoods under one model. mesh: over which batches are sharded; batch_size must be
    divisible by its data, fsdp and expert axes."""

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        compute: ComputeConfig,
        mesh: Mesh,
        batch_size: int,
    ):
        self._model, self._params, self._mesh, self._batch_size = model, params, mesh, batch_size
        self._dtype = compute.dtype
        self._scores: Any = _scores(model, compute, mesh)

    def __call__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], name: str = "likelihood"
    ) -> list[Likelihood]:
        """The likelihood of each (context ids, continuation ids). Where they exceed the model's
        context, the beginning is truncated. Raises ValueError when no token precedes a
        continuation."""
        context = self._model.context
        rows = []
        for front, behind in pairs:
            ids = [*front, *behind][-(context + 1) :]
            check_ids(ids, self._model.vocab_size, name)
            if not front or len(behind) > context:
                raise ValueError(
                    f"a continuation of {counted(len(behind), 'token')} needs a token in front"
                    f" of it, but only {context} fit"
                )
            rows.append((ids, len(behind)))
        order = sorted(
            range(len(rows)), key=lambda i: -len(rows[i][0])
        )  # longest first, so that out-of-memory errors come at once
        results: list[Any] = [None] * len(rows)
        with bar(total=len(rows), desc=name, unit="pair", shown=is_first()) as progress:
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                for i, log_p, greedy in zip(
                    chosen, *self._batch([rows[i] for i in chosen]), strict=False
                ):
                    results[i] = Likelihood(float(log_p), bool(greedy))
                progress.update(len(chosen))
        return results

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        width = min(
            -(-max(len(ids) - 1 for ids, _ in rows) // BUCKET) * BUCKET, self._model.context
        )
        tokens, segments, targets, counted = np.zeros((4, self._batch_size, width), np.int32)
        for row, (ids, behind) in enumerate(rows):
            length = len(ids) - 1
            tokens[row, :length], targets[row, :length], segments[row, :length] = (
                ids[:-1],
                ids[1:],
                1,
            )
            counted[row, length - behind : length] = 1
        sharding = batch_sharding(self._mesh)
        with on_mesh(self._mesh, self._dtype):
            inputs = (put(x, sharding) for x in (tokens, segments, targets, counted.astype(bool)))
            nll, is_greedy = jax.device_get(self._scores(self._params, *inputs))
        return -nll.sum(axis=1, dtype=np.float64), is_greedy


@functools.lru_cache(maxsize=8)
def _scores(model: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> Any:
    """The jitted program, cached by model rather than by parameters, because a model in training is
    scored again and again."""
    llama = Llama(model, dataclasses.replace(compute, dispatch="ragged", remat="none"))

    def scores(
        params: Params,
        tokens: jax.Array,
        segments: jax.Array,
        targets: jax.Array,
        counted: jax.Array,
    ):
        hidden, _ = llama.apply({"params": params}, tokens, segments)
        head, readout = head_kernel(params), Readout.of(model)
        nll, is_best = token_scores(hidden, head, targets, compute.loss_chunk, readout)
        return jnp.where(counted, nll, 0), (is_best | ~counted).all(1)

    return jax.jit(scores, out_shardings=replicated(mesh))
