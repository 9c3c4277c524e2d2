"""Recipes: which models to mix, and how. Every mergekit-moe YAML is a recipe; the keys after
mergekit's are ours."""

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
HIDDEN_LAST = "hidden_last"  # mergekit's alias for hidden
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
    """An expert: a dense model and, for gate modes that read prompts or text, what to route to
    it."""

    source_model: str
    """A directory, a run, a name on the Hub, or `MODEL+LORA`."""
    positive_prompts: tuple[str, ...] = ()
    """Prompts that should be routed to the expert; for gate modes that read prompts."""
    negative_prompts: tuple[str, ...] = ()
    """Prompts that should not be routed to it; their states are subtracted."""
    positive_prompts_file: str = ""
    """A file of more positive prompts, one per line."""
    negative_prompts_file: str = ""
    """A file of more negative prompts, one per line."""
    text: str = ""
    """Text of the expert's domain, for gate_mode ridge or logistic and merge regmean:
    comma-separated `WHAT[#FIELD][:WEIGHT]`, as in a config's data. Without it the prompts are the
    text."""
    noise_scale: Annotated[float, Range(0, 1e3)] = 0.0
    """Standard deviation of the normal noise added to its feed-forward weights."""
    residual_scale: Annotated[float, Range(-HUGE, HUGE)] = 1.0
    """Factor on its down projection."""


@dataclass(frozen=True)
class Recipe(Section):
    """A mixture of experts."""

    base_model: str
    """The model that provides the tokenizer, the settings and, with base: copy, the shared
    weights."""
    experts: tuple[ExpertSource, ...]
    """The experts, in order."""
    shared_experts: tuple[ExpertSource, ...] = ()
    """None, or one expert whose feed-forward every token passes through, in addition to its routed
    experts."""
    architecture: str = ""
    """The Hugging Face class of the mixture: mergekit's Mixtral, DeepSeek MoE, Qwen MoE, Qwen3 MoE
    or the first letters of these, or a model_type. Empty for the class that mergekit would choose,
    or the first that can hold the mixture."""
    gate_mode: Annotated[str, Choice(GATE_MODES, empty=True)] = ""
    """How routers are initialised; see docs/merging.md. By default `hidden` with base: copy, and
    `normal` (standard deviation 0.02, to be trained) with base: average."""
    dtype: Annotated[str, Choice(("float32", "bfloat16", "float16"), empty=True)] = ""
    """Dtype of the mixture's tensors; empty to keep each tensor's own."""
    experts_per_token: Experts = 2
    """Number of experts that each token is routed to."""
    base: Annotated[str, Choice(("copy", "average"))] = "copy"
    """The source of all parameters but the feed-forwards. copy: base_model, as in mergekit.
    average: the mean of all distinct models of the experts, including a shared one's, as in
    Branch-Train-MiX; list the seed among the experts to include it."""
    method: Annotated[str, Choice(tuple(METHODS))] = "btx"
    """What becomes of the feed-forwards. btx: one expert per source. split: each source's
    feed-forward is split into `chunks` experts. blend: expert n consists of the n-th of N chunks of
    every source. The last two are ablations of the BTX paper, section 4.4."""
    chunks: Annotated[int, Range(2, MAX_EXPERTS)] = 2
    """With method split: number of experts per source."""
    merge: Annotated[str, Choice(tuple(MERGE_SETTINGS))] = "mean"
    """How base: average merges. mean: plain mean. ties (arXiv 2306.01708): keep the `density`
    largest changes from base_model, elect signs, take the mean of those that agree. dare (arXiv
    2311.03099): drop changes at random down to `density`, rescale, take the mean. task_arithmetic
    (arXiv 2212.04089): base_model plus `scale` times the sum of all changes from it. slerp:
    spherical interpolation between two models, tensor by tensor. regmean (arXiv 2212.09849): solve
    each linear layer to reproduce each model's outputs on its own text."""
    density: Density = 0.2
    """With ties and dare: the share of changes to keep."""
    scale: Scale = 1.0
    """With task_arithmetic: the factor on the sum of changes."""
    t: Arc = 0.5
    """With slerp: the position along the arc, from 0 (the first model named) to 1 (the second)."""
    alpha: Alpha = 0.99
    """With regmean: the factor on the off-diagonal entries of the inputs' second moments."""
    tokens: TextTokens = 8192
    """With ridge, logistic and regmean: tokens to read of each expert's text. The last eighth is
    held out to evaluate the routers. Use more than the model's width."""
    layers: tuple[Annotated[int, Range(0, 10_000)], ...] = ()
    """Layers that become mixtures, by number from 0; the others stay dense. Empty for all."""
    gate_pooling: Annotated[str, Choice(("mean", "last"))] = "mean"
    """With router_input: use the mean of a prompt's states over its tokens, or the last token's
    state."""
    gate_scale: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    """With router_input: the norm of every router row."""
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    """With gate_mode ridge: settings of the regression."""
    allow: tuple[Annotated[str, Choice(DIFFERENCES)], ...] = ()
    """Settings in which sources may differ from base_model although this changes what their weights
    mean."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Random seed of router rows, noise and dare."""

    def __post_init__(self):
        super().__post_init__()
        mode = {"": "hidden" if self.base == "copy" else "normal", HIDDEN_LAST: "hidden"}
        object.__setattr__(self, "gate_mode", mode.get(self.gate_mode, self.gate_mode))

    @rule
    def _some_experts(self) -> Iterator[str]:
        if not self.experts:
            yield "experts: empty; list at least one"
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
            yield (
                f"shared_experts: {len(self.shared_experts)}; a mixture has at most one;"
                " leave the others out"
            )

    @rule
    def _known_architecture(self) -> Iterator[str]:
        if not model_types(self.architecture):
            yield f"architecture={self.architecture!r}: known: {spellings()}"

    @rule
    def _what_is_read(self) -> Iterator[str]:
        if self.gate_scale != Recipe.gate_scale and self.gate_mode != "router_input":
            yield (
                f"gate_scale={self.gate_scale}: only used with gate_mode router_input; leave it out"
            )
        if self.ridge != RidgeConfig() and self.gate_mode != RIDGE:
            yield f"ridge: only used with gate_mode {RIDGE}; leave it out"
        if self.tokens != Recipe.tokens and not reads_text(self):
            yield (
                f"tokens={self.tokens}: only used with {_READ_TEXT}, which read text; leave it out"
            )
        yield from unread(self, Recipe)

    @rule
    def _merge_of_average(self) -> Iterator[str]:
        if self.merge != "mean" and self.base != "average":
            yield (
                f"merge={self.merge!r}: only used with base: average; set that, or leave merge out"
            )
        wanted, named = MERGES[self.merge].models, len(_models(self))
        if wanted and named != wanted:
            yield (
                f"merge={self.merge!r}: merges exactly {wanted} models, but the experts come"
                f" from {named}; name {wanted}, or use another merge"
            )

    @rule
    def _split_of_all_layers(self) -> Iterator[str]:
        if self.method == "split" and self.layers:
            yield (
                "method: split makes all feed-forwards narrower, so it must apply to all"
                " layers; leave layers out"
            )

    @rule
    def _gates_of_sources(self) -> Iterator[str]:
        mode = self.gate_mode or ("hidden" if self.base == "copy" else "normal")
        if mode not in (*PROMPT_MODES, HIDDEN_LAST, *SOLVED):
            return
        if self.method != "btx":
            yield (
                f"gate_mode={mode!r}: experts of method {self.method!r} come from no single"
                " source; use normal"
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
                f"experts: all have the same {'text' if mode in SOLVED else 'prompts'}, so all"
                " router rows would be equal; use gate_mode: normal"
            )

    @rule
    def _texts_are_read(self) -> Iterator[str]:
        for i, expert in enumerate(self.experts):
            if expert.text and not reads_text(self):
                yield f"experts[{i}].text: only used with {_READ_TEXT}; set one, or leave it out"
            if self.gate_mode in SOLVED and (
                expert.negative_prompts or expert.negative_prompts_file
            ):
                yield (
                    f"experts[{i}].negative_prompts: not used by"
                    f" gate_mode={self.gate_mode!r}; leave them out"
                )
        for i, expert in enumerate(self.shared_experts):
            if expert.text and self.merge != REGMEAN:
                yield f"shared_experts[{i}].text: only used with merge={REGMEAN!r}; leave it out"

    @rule
    def _texts_of_regmean(self) -> Iterator[str]:
        if self.merge != REGMEAN:
            return
        if self.method != "btx":
            yield (
                f"merge={REGMEAN!r}: experts of method {self.method!r} come from no single"
                " source; use method btx, or another merge"
            )
        for key in ("experts", "shared_experts"):
            for i, expert in enumerate(getattr(self, key)):
                if not (expert.text or expert.positive_prompts or expert.positive_prompts_file):
                    yield f"{key}[{i}]: no text, and merge={REGMEAN!r} reads it"

    @property
    def sources(self) -> tuple[ExpertSource, ...]:
        """Sources of the routed experts, then the shared expert's."""
        return (*self.experts, *self.shared_experts)

    @property
    def expert_count(self) -> int:
        return expert_count(self)


def reads_text(recipe: Recipe) -> bool:
    """Whether text of the experts' domains is read. Rules call it too, so the recipe may be
    incomplete."""
    return recipe.gate_mode in SOLVED or recipe.merge == REGMEAN


def _models(recipe: Recipe) -> set[str]:
    """The distinct models of all experts. Rules call it too, so the recipe may be incomplete."""
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
    """Number of routed experts in a layer. Rules call it too, so the recipe may be incomplete."""
    return count(recipe.method, len(recipe.experts), recipe.chunks)


def describe(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)
