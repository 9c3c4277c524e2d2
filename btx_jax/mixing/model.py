"""Choose the Hugging Face class and ModelConfig of a recipe's mixture."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

from btx_jax.architectures.family import Family
from btx_jax.architectures.registry import candidates, known_families
from btx_jax.config.mix_methods import cut
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.errors import ConfigError, UserError
from btx_jax.mixing.homes import MERGEKIT, model_types
from btx_jax.mixing.limits import within
from btx_jax.mixing.recipe import PROMPT_MODES, Recipe

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """The class and model of a mixture. family: None for a mixture in our own format that no known
    class can hold."""

    family: Family | None
    model: ModelConfig


def choose(
    recipe: Recipe, dense: ModelConfig, kinds: Sequence[str], as_huggingface: bool
) -> Chosen:
    """Choose the mixture's class and model; the model includes any zero tensors that the class
    requires.

    dense: base_model's config, within the limits of all sources. kinds: the model_types of
    base_model and of each source, "" where unknown.

    The class is the one that mergekit would choose, if it can hold the mixture; otherwise the home
    of base_model's family, or else the first class that can. A class without sliding windows limits
    the context to the window. Raises UserError if no class can hold the mixture, unless it is
    written in our own format and the recipe names no class.
    """
    tried: list[tuple[Family, ModelConfig, list[str]]] = []
    for family in _in_order(recipe, kinds):
        seen = _within_window(dense, family) if as_huggingface else dense
        model = mixture_of(recipe, seen, family)
        problems = _of_gate(recipe, family) + family.lacks(model)
        if not problems:
            if seen != dense:
                log.warning(
                    "the context is limited to %d, the window of some layers, as %s has no windows",
                    seen.context,
                    family.model_class,
                )
            if as_huggingface or recipe.architecture:
                model = _with_biases(model, family)
            filled = family.filled(model) if as_huggingface else model
            if filled.norm != model.norm:
                log.warning(
                    "%s has no LayerNorms, so they are folded into the weights; dtype: float32"
                    " avoids the rounding of bfloat16",
                    family.model_class,
                )
            return Chosen(family, filled)
        tried.append((family, model, problems))
    if not recipe.architecture and not as_huggingface:
        return Chosen(None, mixture_of(recipe, dense, None))
    family, _, problems = tried[0]
    named = f"recipe.architecture={recipe.architecture!r}: " if recipe.architecture else ""
    raise UserError(
        f"{named}Hugging Face's {family.model_class} does not have what this mixture needs:"
        f" {'; '.join(problems)}; {_cure(recipe, dense, kinds)}"
    )


def _within_window(dense: ModelConfig, family: Family) -> ModelConfig:
    """The model with its context limited to its window, for a class without windows."""
    if not dense.window or family.window or dense.window_theta:
        return dense
    return within(dense, min(dense.context, dense.window), 0)


def _in_order(recipe: Recipe, kinds: Sequence[str]) -> list[Family]:
    named = model_types(recipe.architecture)
    families = known_families()
    theirs = [kind for kind in _mergekits(recipe, kinds) if kind in named]
    order = [*(families[kind] for kind in theirs), *candidates(True, kinds[0])]
    order += [families[kind] for kind in named]
    return list(dict.fromkeys(family for family in order if family.model_type in named))


def _mergekits(recipe: Recipe, kinds: Sequence[str]) -> list[str]:
    """Model types that mergekit-moe would accept, in its order of preference."""
    shared = recipe.shared_experts
    has_prompts = any(expert.positive_prompts or expert.negative_prompts for expert in shared)
    fits = all(expert.positive_prompts for expert in shared) or recipe.gate_mode == "random"
    return [
        kind
        for kind, home in MERGEKIT.items()
        if len(set(kinds)) == 1
        and kinds[0] in home.sources
        and (home.has_shared or not shared)
        and (not home.has_gate or (shared and fits))
        and (home.has_gate or not has_prompts)
    ]


def _of_gate(recipe: Recipe, family: Family) -> list[str]:
    """What the class lacks with regard to the shared expert's gate, as short phrases: a gate, if
    the recipe has prompts for one, or no gate, if prompts for it are missing. [] if it fits."""
    if not recipe.shared_experts or not family.moe or not family.moe.has_shared:
        return []
    shared = recipe.shared_experts[0]
    if not family.moe.has_shared_gate:
        has_prompts = shared.positive_prompts or shared.negative_prompts
        return ["a gate of the shared expert, for its prompts"] if has_prompts else []
    if recipe.gate_mode in PROMPT_MODES and not shared.positive_prompts:
        return [
            "a shared expert without a gate (or give it positive_prompts, which"
            f" gate_mode={recipe.gate_mode!r} reads for its gate)"
        ]
    return []


def _with_biases(model: ModelConfig, family: Family) -> ModelConfig:
    """The model with the biases that mergekit adds for this class."""
    theirs = MERGEKIT[family.model_type].biases if family.model_type in MERGEKIT else ()
    return dataclasses.replace(model, biases=tuple(dict.fromkeys((*model.biases, *theirs))))


def _cure(recipe: Recipe, dense: ModelConfig, kinds: Sequence[str]) -> str:
    free = dataclasses.replace(recipe, architecture="")
    holding = []
    for family in _in_order(free, kinds):
        model = mixture_of(free, dense, family)
        if not (_of_gate(free, family) or family.lacks(model)):
            holding.append(family.model_type)
    if holding:
        return f"say architecture: {' or '.join(holding)}"
    left_out = "leave architecture out and " if recipe.architecture else ""
    return f"{left_out}write it in our own format: --format=btx_jax"


def mixture_of(recipe: Recipe, dense: ModelConfig, family: Family | None) -> ModelConfig:
    """The mixture of dense models as a class represents it, with or without a gate on its shared
    expert. Raises UserError for layers that do not exist, for a d_ff that cannot be split, and for
    features of the models that no mixture supports."""
    for layer in recipe.layers:
        if not 0 <= layer < dense.layers:
            raise UserError(
                f"layers: there is no layer {layer}; the models have layers 0 to {dense.layers - 1}"
            )
    try:
        made = cut(recipe.method, len(recipe.experts), recipe.chunks, dense.d_ff)
    except ConfigError as error:
        raise UserError(f"recipe.{error}") from None
    chosen = set(recipe.layers) or set(range(dense.layers))
    shared = recipe.shared_experts
    has_gate = bool(shared and (shared[0].positive_prompts or shared[0].negative_prompts))
    if family and family.moe and family.moe.has_shared:
        has_gate = bool(shared) and family.moe.has_shared_gate
    moe = MoEConfig(
        tuple(made.experts if layer in chosen else 0 for layer in range(dense.layers)),
        recipe.experts_per_token,
        shared_d_ff=dense.d_ff if shared else 0,
        shared_gate=has_gate,
        renormalise=recipe.experts_per_token > 1
        or not (family and family.moe and not family.moe.renormalises_one),
    )
    try:
        return dataclasses.replace(dense, d_ff=made.d_ff, moe=moe)
    except ConfigError as error:
        raise UserError(f"{recipe.base_model}: {error}") from None
