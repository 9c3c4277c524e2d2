"""Reports about a mixture made by a recipe: tables to print before and while it is made, and its
model card."""

import json
from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from btx_jax import __version__
from btx_jax.architectures.family import Family
from btx_jax.checkpoints.training_state import History, trained_on
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.ridge import SOLVED
from btx_jax.mixing.prompts import Prompt
from btx_jax.mixing.recipe import PROMPT_MODES, Recipe, describe
from btx_jax.mixing.streaming import Mixture
from btx_jax.models.llama import parameter_counts

BANDS = 4  # groups of layers in the routing table


def routing_table(model: ModelConfig, prompts: Sequence[Prompt], shares: np.ndarray) -> Table:
    """Table of the experts that the prompts' tokens choose first. shares: [prompts, layers,
    experts]."""
    layers = [layer for layer, spec in enumerate(model.layer_specs()) if spec.experts]
    bands = [
        band for band in np.array_split(np.array(layers), min(BANDS, len(layers))) if len(band)
    ]
    table = Table(title="top-1 expert of the prompts' tokens: share per expert, by layer")
    table.add_column("prompt of")
    table.add_column("text", max_width=24, no_wrap=True)
    for band in bands:
        table.add_column(
            f"{band[0]}-{band[-1]}" if len(band) > 1 else str(band[0]), justify="right"
        )
    for prompt, share in zip(prompts, shares, strict=True):
        cells = []
        for band in bands:
            by_expert = share[band].mean(0)
            best = int(by_expert.argmax())
            colour = "green" if (best == prompt.source) == prompt.is_positive else "red"
            cells.append(Text(f"{best}: {by_expert[best]:.0%}", colour))
        table.add_row(
            f"{'+' if prompt.is_positive else '-'}{prompt.source}",
            prompt.text.replace("\n", " "),
            *cells,
        )
    return table


def own_table(names: Sequence[str], own: np.ndarray) -> Table:
    """Table of how solved routers route held-out text. names: of the texts' experts. own: [layers,
    texts], NaN for dense layers."""
    table = Table(title="share of held-out tokens whose top-1 expert is their own")
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(name.rstrip("/").rpartition("/")[2] or name, justify="right")
    for layer, shares in enumerate(own):
        if not np.isnan(shares).all():
            table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    return table


def plan(recipe: Recipe, model: ModelConfig, dtype: np.dtype, family: Family | None) -> Table:
    """Table of the mixture to be made. family: None for btx_jax's own format."""
    total, active = parameter_counts(model)
    table = Table(title="plan", show_header=False)
    shared = (
        "copied from base_model"
        if recipe.base == "copy"
        else f"{recipe.merge} over the experts' models"
    )
    cut = {
        "btx": "",
        "split": f", each source cut into {recipe.chunks}",
        "blend": ", each made of chunks of all sources",
    }[recipe.method]
    layers = sum(bool(spec.experts) for spec in model.layer_specs())
    for key, value in (
        (
            "experts",
            (
                f"{recipe.expert_count} in {layers} of {model.layers} layers,"
                f" top-{recipe.experts_per_token}{cut}"
            ),
        ),
        *((f"  {i}", expert.source_model) for i, expert in enumerate(recipe.experts)),
        *(("shared expert", expert.source_model) for expert in recipe.shared_experts),
        ("other tensors", shared),
        ("routers", recipe.gate_mode),
        ("parameters", f"{total:,} total, {active:,} active per token"),
        (
            "output",
            (
                f"{f'Hugging Face ({family.model_type})' if family else 'btx_jax'}, {dtype.name},"
                f" {total * dtype.itemsize / 2**30:.2f} GiB"
            ),
        ),
    ):
        table.add_row(key, value)
    return table


def card(mixture: Mixture, history: History) -> str:
    """The mixture's model card."""
    recipe = mixture.recipe
    total, active = parameter_counts(mixture.model)
    kind = "Branch-Train-MiX" if recipe.base == "average" else "frankenMoE"
    experts, models = recipe.expert_count, len(set(mixture.source_of))
    lines = [f"- {expert.source_model}" for expert in recipe.experts]
    lines += [f"- {expert.source_model} (shared)" for expert in recipe.shared_experts]
    trained = "Its routers have not been trained."
    if recipe.gate_mode in PROMPT_MODES:
        trained = "Its routers come from prompts, untrained."
    if recipe.gate_mode in SOLVED:
        trained = "Its routers are solved from text of each expert's domain, untrained."
    return (
        f"# {kind}: {experts} expert{'s' * (experts > 1)} of {models} model{'s' * (models > 1)}\n\n"
        f"Mixed by btx_jax {__version__}: {total:,} parameters, {active:,} active per token."
        f" {trained}{trained_on(history)}\n\n"
        + "\n".join(lines)
        + f"\n\nRecipe:\n\n```json\n{json.dumps(describe(recipe), indent=2)}\n```\n"
    )
