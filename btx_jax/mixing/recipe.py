"""Recipes: which models become which mixture. A mergekit-moe YAML is one; the keys that follow its
own are ours."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from btx_jax.config.merges import (
    MERGE_SETTINGS,
    REGMEAN,
    Alpha,
    Arc,
    Density,
    Scale,
    TextTokens,
    unread,
)
from btx_jax.config.mix_methods import METHODS, count
from btx_jax.config.ridge import RIDGE, SOLVED, RidgeConfig
from btx_jax.config.schema import HUGE, Choice, Experts, Range, Section, rule
from btx_jax.mixing.homes import model_types, spellings
from btx_jax.mixing.merge import MERGES

PROMPT_MODES = ("cheap_embed", "hidden", "hidden_avg", "router_input")
HIDDEN_LAST = "hidden_last"  # mergekit's other name for hidden
GATE_MODES = ("normal", "random", "uniform_random", *PROMPT_MODES, HIDDEN_LAST, *SOLVED)
MAX_EXPERTS = 1024
_READ_TEXT = f"gate_mode={SOLVED[0]!r} or {SOLVED[1]!r} and merge={REGMEAN!r}"
DIFFERENCES = (
    "vocab_size",
    "heads",
    "kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "tied_head",
    "tokenizer",
)


@dataclass(frozen=True)
class ExpertSource(Section):
    """One expert: a dense model and, for gate modes that read prompts, what should be routed to it.

    positive_prompts_file, negative_prompts_file: more prompts, one a line, which `read_recipe` puts
    behind the others. text: of its domain, for gate_mode ridge or logistic and merge regmean:
    comma-separated `WHAT[#FIELD][:WEIGHT]`, as in a config's data; where there is none, the prompts
    are the text.
    noise_scale: standard deviation of normal noise added to its feed-forward weights.
    residual_scale: factor on its down projection.
    """

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    positive_prompts_file: str = ""
    negative_prompts_file: str = ""
    text: str = ""
    noise_scale: Annotated[float, Range(0, 1e3)] = 0.0
    residual_scale: Annotated[float, Range(-HUGE, HUGE)] = 1.0


@dataclass(frozen=True)
class Recipe(Section):
    """A mixture of experts.

    shared_experts: none, or one whose feed-forward every token passes through, besides those of its
    routed experts.
    architecture: the class of Hugging Face that holds the mixture: mergekit's Mixtral, DeepSeek
    MoE, Qwen MoE, Qwen3 MoE or the first letters of these, or a model_type. Empty for the one that
    mergekit would choose, or the first that holds it.
    base: where everything but the feed-forwards comes from: `copy` (base_model, as mergekit does)
    or `average` (the mean of all distinct experts' models, a shared one's among them, as
    Branch-Train-MiX does; list the seed among the experts to include it).
    method: what becomes of the feed-forwards: `btx` (one expert per source), `split` (each source's
    cut into `chunks` experts) or `blend` (expert n is the n-th of N chunks of every source); the
    latter two are ablations of the BTX paper, section 4.4.
    merge: how `average` averages: `mean`, `ties` (arXiv 2306.01708: keep the `density` largest
    changes from base_model, elect signs, mean of those that agree), `dare` (arXiv 2311.03099:
    drop changes at random down to `density`, rescale, mean), `task_arithmetic` (arXiv 2212.04089:
    base_model plus `scale` times the sum of all changes from it), `slerp` (of two models: each
    tensor on the arc between them, at `t` of the way from the first one named to the second) or
    `regmean` (arXiv 2212.09849: linear layers solved so that they answer on each model's own text
    as that model did, with `alpha` of what inputs have in common; docs/inputs.md).
    tokens: read of each expert's text for `ridge` and `regmean`. The last eighth of them is held
    out, to measure routers on. More than the model's width want to be left.
    layers: the layers that become mixtures; the others stay dense. Empty for all.
    gate_mode: how routers start; `hidden` when base is copy, `normal` (std 0.02, to be trained)
    when it is average.
    gate_pooling, gate_scale: of router_input: `mean` over tokens or `last`; the length of every
    router row. ridge: of ridge, which solves rows from text of every expert's domain, and keeps
    what they are solved from; `logistic` fits them to the same text.
    allow: settings in which sources may differ from base_model although it changes what their
    weights mean.
    """

    base_model: str
    experts: tuple[ExpertSource, ...]
    shared_experts: tuple[ExpertSource, ...] = ()
    architecture: str = ""
    gate_mode: Annotated[str, Choice(GATE_MODES, empty=True)] = ""
    dtype: Annotated[str, Choice(("float32", "bfloat16", "float16"), empty=True)] = ""
    experts_per_token: Experts = 2
    base: Annotated[str, Choice(("copy", "average"))] = "copy"
    method: Annotated[str, Choice(tuple(METHODS))] = "btx"
    chunks: Annotated[int, Range(2, MAX_EXPERTS)] = 2
    merge: Annotated[str, Choice(tuple(MERGE_SETTINGS))] = "mean"
    density: Density = 0.2
    scale: Scale = 1.0
    t: Arc = 0.5
    alpha: Alpha = 0.99
    tokens: TextTokens = 8192
    layers: tuple[Annotated[int, Range(0, 10_000)], ...] = ()
    gate_pooling: Annotated[str, Choice(("mean", "last"))] = "mean"
    gate_scale: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    allow: tuple[Annotated[str, Choice(DIFFERENCES)], ...] = ()
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self):
        super().__post_init__()
        mode = {"": "hidden" if self.base == "copy" else "normal", HIDDEN_LAST: "hidden"}
        object.__setattr__(self, "gate_mode", mode.get(self.gate_mode, self.gate_mode))

    @rule
    def _some_experts(self) -> Iterator[str]:
        if not self.experts:
            yield "experts: none named"
        elif expert_count(self) > MAX_EXPERTS:
            yield f"experts: {expert_count(self)}; at most {MAX_EXPERTS}"
        elif self.experts_per_token > expert_count(self):
            yield (
                f"experts_per_token={self.experts_per_token}: more than the {expert_count(self)}"
                " experts; lower it or add experts"
            )

    @rule
    def _one_shared_expert(self) -> Iterator[str]:
        if len(self.shared_experts) > 1:
            yield f"shared_experts: {len(self.shared_experts)}; a mixture has at most one"

    @rule
    def _known_architecture(self) -> Iterator[str]:
        if not model_types(self.architecture):
            yield f"architecture={self.architecture!r}: known: {spellings()}"

    @rule
    def _what_is_read(self) -> Iterator[str]:
        if self.gate_scale != Recipe.gate_scale and self.gate_mode != "router_input":
            yield f"gate_scale={self.gate_scale}: of gate_mode router_input; leave it out"
        if self.ridge != RidgeConfig() and self.gate_mode != RIDGE:
            yield f"ridge: of gate_mode {RIDGE}; leave it out"
        if self.tokens != Recipe.tokens and not reads_text(self):
            yield f"tokens={self.tokens}: of {_READ_TEXT}, which read text; leave it out"
        yield from unread(self, Recipe)

    @rule
    def _merge_of_average(self) -> Iterator[str]:
        if self.merge != "mean" and self.base != "average":
            yield f"merge={self.merge!r}: says how to average, so it needs base: average"
        wanted, named = MERGES[self.merge].models, len(_models(self))
        if wanted and named != wanted:
            yield (
                f"merge={self.merge!r}: of {wanted} models, and the experts' are {named}; name"
                " that many, or another merge"
            )

    @rule
    def _split_of_all_layers(self) -> Iterator[str]:
        if self.method == "split" and self.layers:
            yield (
                "method: split makes narrower feed-forwards, which all layers must share; leave"
                " layers out"
            )

    @rule
    def _gates_of_sources(self) -> Iterator[str]:
        mode = self.gate_mode or ("hidden" if self.base == "copy" else "normal")
        if mode not in (*PROMPT_MODES, HIDDEN_LAST, *SOLVED):
            return
        if self.method != "btx":
            yield (
                f"gate_mode={mode!r}: experts of method {self.method!r} belong to no source; use"
                " normal"
            )
        missing = [
            str(i)
            for i, expert in enumerate(self.experts)
            if not (
                expert.positive_prompts
                or expert.positive_prompts_file
                or (mode in SOLVED and expert.text)
            )
        ]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            yield (
                f"experts[{'], ['.join(missing[:10])}]{more}: no"
                f" {'text' if mode in SOLVED else 'positive_prompts'}, and gate_mode={mode!r} reads"
                f" {'it' if mode in SOLVED else 'them'}"
            )
        elif len(self.experts) > 1 and len({_prompts_of(expert) for expert in self.experts}) == 1:
            yield (
                f"experts: all have the same {'text' if mode in SOLVED else 'prompts'}, so that all"
                " router rows would be equal; use gate_mode: normal"
            )

    @rule
    def _texts_are_read(self) -> Iterator[str]:
        for i, expert in enumerate(self.experts):
            if expert.text and not reads_text(self):
                yield f"experts[{i}].text: {_READ_TEXT} read it; say one, or leave it out"
            if self.gate_mode in SOLVED and (
                expert.negative_prompts or expert.negative_prompts_file
            ):
                yield f"experts[{i}].negative_prompts: gate_mode={self.gate_mode!r} reads none"
        for i, expert in enumerate(self.shared_experts):
            if expert.text and self.merge != REGMEAN:
                yield f"shared_experts[{i}].text: merge={REGMEAN!r} alone reads it; leave it out"

    @rule
    def _texts_of_regmean(self) -> Iterator[str]:
        if self.merge != REGMEAN:
            return
        if self.method != "btx":
            yield (
                f"merge={REGMEAN!r}: experts of method {self.method!r} belong to no source; use"
                " method btx, or another merge"
            )
        for key in ("experts", "shared_experts"):
            for i, expert in enumerate(getattr(self, key)):
                if not (expert.text or expert.positive_prompts or expert.positive_prompts_file):
                    yield f"{key}[{i}]: no text, and merge={REGMEAN!r} reads it"

    @property
    def sources(self) -> tuple[ExpertSource, ...]:
        """Of the routed experts, then of the shared one."""
        return (*self.experts, *self.shared_experts)

    @property
    def expert_count(self) -> int:
        return expert_count(self)


def reads_text(recipe: Recipe) -> bool:
    """Of experts' domains. Also for rules, whose recipe is not whole."""
    return recipe.gate_mode in SOLVED or recipe.merge == REGMEAN


def _models(recipe: Recipe) -> set[str]:
    """Also for rules, whose recipe is not whole."""
    return {expert.source_model for expert in (*recipe.experts, *recipe.shared_experts)}


def _prompts_of(expert: ExpertSource) -> tuple:
    return (
        expert.positive_prompts,
        expert.negative_prompts,
        expert.positive_prompts_file,
        expert.negative_prompts_file,
        expert.text,
    )


def expert_count(recipe: Recipe) -> int:
    """Also for rules, whose recipe is not whole."""
    return count(recipe.method, len(recipe.experts), recipe.chunks)


def describe(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)
