"""Router rows of a recipe: random, or from base_model's hidden states of the recipe's prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from btx_jax.architectures.tensors import Reader
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import Tokenizer, check_ids
from btx_jax.errors import UserError
from btx_jax.mixing.gates import gate_row, pool, random_gates
from btx_jax.mixing.recipe import PROMPT_MODES, Recipe
from btx_jax.mixing.states import layer_states, token_embeddings
from btx_jax.progress import bar


class Prompt(NamedTuple):
    """A prompt of an expert. source: index into recipe.sources, where the shared expert is last."""

    source: int
    is_positive: bool
    text: str
    ids: list[int]


class Gates(NamedTuple):
    """Router rows, from prompts or random.

    rows: [layers, experts, D] float32, with an additional row if the shared expert has a gate.
    shares: [prompts, layers, experts], the share of a prompt's tokens that choose each expert
    first; empty for random rows, which need training.
    """

    rows: np.ndarray
    shares: np.ndarray


def read_prompts(recipe: Recipe, tokenizer: Tokenizer | None, model: ModelConfig) -> list[Prompt]:
    """Every prompt that gates are computed from, starting with BOS if the tokenizer has one, as in
    mergekit; none for random gates. Raises UserError for prompts that the model cannot read."""
    has_gate = bool(model.moe and model.moe.shared_gate)
    sources = recipe.sources if has_gate else recipe.experts
    if recipe.gate_mode not in PROMPT_MODES:
        return []
    prompts = []
    for number, expert in enumerate(sources):
        where = f"experts[{number}]" if number < len(recipe.experts) else "shared_experts[0]"
        for is_positive, texts in (
            (True, expert.positive_prompts),
            (False, expert.negative_prompts),
        ):
            for text in texts:
                ids = _ids(recipe, tokenizer, model, where, text)
                prompts.append(Prompt(number, is_positive, text, ids))
    return prompts


def _ids(
    recipe: Recipe, tokenizer: Tokenizer | None, model: ModelConfig, where: str, text: str
) -> list[int]:
    if tokenizer is None:
        raise UserError(f"{recipe.base_model}: no tokenizer, but {where} has prompts to tokenise")
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
    if not ids:
        raise UserError(f"{where}: prompt {text!r} has no tokens")
    check_ids(ids, model.vocab_size, f"{where}: prompt {text[:40]!r}", tokenizer)
    if len(ids) > model.context:
        raise UserError(
            f"{where}: prompt {text[:40]!r}... has {len(ids)} tokens, but the context is"
            f" {model.context}; shorten it"
        )
    return ids


def make_gates(
    recipe: Recipe, base: Reader, model: ModelConfig, prompts: Sequence[Prompt]
) -> Gates:
    """The gates of the mixture `model`.

    A shared expert's gate gets the row that a routed expert with the same prompts would get. In
    random modes it gets another row of the same distribution, except for `normal`: there it is
    zero, which gives a weight of one half.
    """
    has_gate = bool(recipe.shared_experts and model.moe and model.moe.shared_gate)
    experts, mode = recipe.expert_count, recipe.gate_mode
    shape = (model.layers, experts + has_gate, model.d_model)
    if mode not in PROMPT_MODES:
        rows = np.zeros(shape, np.float32)
        drawn = experts if mode == "normal" else shape[1]
        rows[:, :drawn] = random_gates(mode, model.layers, drawn, model.d_model, recipe.seed)
        return Gates(rows, np.zeros((0, model.layers, experts), np.float32))
    gates = np.zeros(shape, np.float32)

    def rows_of(states: Sequence[np.ndarray]) -> np.ndarray:
        def pooled(number: int, is_positive: bool) -> np.ndarray | None:
            chosen = [
                s
                for s, p in zip(states, prompts, strict=True)
                if (p.source, p.is_positive) == (number, is_positive)
            ]
            return pool(chosen, mode, recipe.gate_pooling) if chosen else None

        made = []
        for number in range(shape[1]):
            positive = pooled(number, True)
            assert positive is not None  # guaranteed by the recipe
            made.append(gate_row(positive, pooled(number, False)))
        return np.stack(made)

    if mode == "cheap_embed":
        gates[:] = rows_of(token_embeddings(base, [prompt.ids for prompt in prompts]))
    shares = np.zeros((len(prompts), model.layers, experts), np.float32)
    states = layer_states(base, [prompt.ids for prompt in prompts])
    for layer, (inputs, router_inputs) in enumerate(
        bar(states, total=model.layers, desc="prompts", unit="layer")
    ):
        if mode != "cheap_embed":
            gates[layer] = rows_of(router_inputs if mode == "router_input" else inputs)
        if mode == "router_input":
            gates[layer] *= recipe.gate_scale
        for number, state in enumerate(router_inputs):
            chosen = (state @ gates[layer, :experts].T).argmax(-1)
            shares[number, layer] = np.bincount(chosen, minlength=experts) / len(chosen)
    return Gates(gates, shares)
