"""The experts that each layer chooses for every token of a text."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import Tokenizer
from btx_jax.models.layers import on_mesh
from btx_jax.models.llama import Llama, Params
from btx_jax.models.routing import feed_forward_routing
from btx_jax.parallel.hosts import put
from btx_jax.parallel.sharding import batch_sharding, replicated


def explain(
    model: ModelConfig,
    compute: ComputeConfig,
    params: Params,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[int]],
    mesh: Mesh,
) -> dict[str, dict[str, Any]]:
    """Experts of every token of texts, name -> token ids. Returns name -> {pieces [T]: text of each
    token; experts, gates [layers][T][K]: for the MoE layers, best first; layers: their numbers}.
    Texts longer than the model's context are truncated."""
    if not texts:
        return {}
    llama = Llama(
        model,
        dataclasses.replace(compute, dispatch="ragged", remat="none", quantize="none"),
        keep_choices=True,
    )
    cut = {name: list(ids)[: model.context] for name, ids in texts.items()}
    width = -(-max(map(len, cut.values())) // 64) * 64
    sharding = batch_sharding(mesh)
    rows = -(-len(cut) // sharding.num_devices) * sharding.num_devices
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row, ids in enumerate(cut.values()):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1

    def choices(params, tokens, segments):
        stats: Any = feed_forward_routing(llama.apply({"params": params}, tokens, segments)[1])

        def split(x_LGSK: jax.Array) -> jax.Array:
            return x_LGSK.reshape(x_LGSK.shape[0], rows, width, -1)  # [L, B, T, K]

        return [(split(run.choice.index_GSK), split(run.choice.gate_GSK)) for run in stats.values()]

    with on_mesh(mesh, compute.dtype):
        chosen = jax.jit(choices, out_shardings=replicated(mesh))(
            params, put(tokens, sharding), put(segments, sharding)
        )
    runs = jax.device_get(chosen)
    numbers = [layer for layer, spec in enumerate(model.layer_specs()) if spec.experts]
    return {
        name: {
            "pieces": pieces(tokenizer, ids),
            "layers": numbers,
            "experts": [layer.tolist() for index, _ in runs for layer in index[:, row, : len(ids)]],
            "gates": [
                np.round(layer.astype(np.float64), 4).tolist()
                for _, gate in runs
                for layer in gate[:, row, : len(ids)]
            ],
        }
        for row, (name, ids) in enumerate(cut.items())
    }


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the decoded text. A character that spans several
    tokens is attributed to the last one."""
    whole = tokenizer.decode(ids)
    # Incomplete bytes may decode differently once more follow.
    sure = (
        _agreeing(whole, tokenizer.decode(ids[:count]).rstrip("\ufffd"))
        for count in range(1, len(ids))
    )
    ends = [0, *itertools.accumulate(sure, max), len(whole)] if ids else []
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def _agreeing(one: str, other: str) -> int:
    """Number of leading characters that the two have in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
