"""Presets by name, for `--config=NAME[:ARGUMENT]`, `btx run NAME[:ARGUMENT]` and the files in
configs/. A preset's module is imported only when the preset is used."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from btx_jax.config.config import Config


@dataclass(frozen=True)
class Preset:
    """A named config function.

    told: description in one line.
    function: MODULE.NAME in this package.
    fixed: the function's first arguments; the ARGUMENT after the colon is its next.
    argument: description of what may follow the colon; "" for nothing.
    """

    told: str
    function: str
    fixed: tuple[str, ...] = ()
    argument: str = "SIZE"

    @property
    def make(self) -> Callable[..., Config]:
        """([ARGUMENT]) -> config. Raises ConfigError for an unknown argument."""
        module, _, name = self.function.partition(".")
        function = getattr(importlib.import_module(f"btx_jax.presets.{module}"), name)
        return functools.partial(function, *self.fixed)


PRESETS = {
    "demo": Preset(
        "Branch-Train-MiX from scratch to a report, on a laptop CPU", "recipes.demo", argument=""
    ),
    "btx": Preset("the whole pipeline from a seed, with its stages as jobs", "recipes.btx"),
    "seed": Preset("a Llama from scratch", "recipes.seed"),
    "math_expert": Preset("a branch for mathematics", "recipes.expert", ("math",)),
    "code_expert": Preset("a branch for source code", "recipes.expert", ("code",)),
    "wiki_expert": Preset("a branch for world knowledge", "recipes.expert", ("wiki",)),
    "mix": Preset("mix N dense checkpoints into one MoE", "recipes.mix"),
    "moe_finetune": Preset("the mixture trained on all domains", "recipes.moe_finetune"),
    "dense": Preset(
        "baseline: the seed trained on all text that BTX saw, without branches", "recipes.dense"
    ),
    "sparse_upcycling": Preset(
        "baseline: four copies of the seed's feed-forwards", "recipes.sparse_upcycling"
    ),
    "evaluate": Preset("held-out loss of every model on every domain", "recipes.evaluate"),
    "comparison": Preset(
        "BTX with its baselines and ablations, from one seed",
        "recipes.comparison",
        argument="SIZE[,ARMS]",
    ),
    "bar": Preset("branches with an anchor, unfrozen in stages", "anchors.bar"),
    "mola": Preset(
        "LoRA experts on a frozen model, learning a test set", "lora_recipes.mola", argument="TASK"
    ),
    "continual": Preset(
        "one task after another on the same LoRA experts",
        "lora_recipes.continual",
        argument="TASK,TASK...",
    ),
    "paper_small": Preset(
        "when mixing pays, at a million parameters", "study.paper_small", argument="ARMS or report"
    ),
    "mola_small": Preset(
        "MoLA's five shapes and plain LoRA, small", "recipes.mola_small", argument="report"
    ),
}
SIZES = (
    "SIZE: llama2_7b (the paper's, the default), llama3_8b, llama31_8b, mistral_7b, qwen3_8b;"
    " tiny, for a laptop; from_init[,CHECKPOINT], for one machine, on a released model"
)
