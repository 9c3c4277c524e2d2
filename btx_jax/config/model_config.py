"""The definition of a model: architecture, mixtures, LoRA experts. Stored in every checkpoint; an
invalid value raises ConfigError."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from btx_jax.config.allocation import experts_per_layer
from btx_jax.config.schema import HUGE, Choice, Experts, Positive, Range, Section, Share, rule
from btx_jax.errors import ConfigError, Mistakes, UserError, suggest
from btx_jax.terminal import counted

ROUTINGS = ("top_k", "switch", "soft", "sample_top1")
GATINGS = ("top_k", "sigmoid", "cosine")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # the linear maps of a dense layer
SCALINGS = ("none", "linear", "llama3", "longrope", "dynamic", "yarn", "alpha")
NORMS = ("rms", "rms_plus_one", "layer")
NORM_PLACES = ("before", "after", "both")
QK_NORMS = ("head", "width", "rotated")
ACTIVATIONS = ("silu", "gelu_tanh")

# Far beyond any model ever trained: anything larger is a mistake, and would hang or exhaust memory
# before another check could report it.
MAX_PARAMETERS = 10**13
MAX_EXPERTS = 100_000  # over all layers; each expert is three tensors in a Hugging Face directory
MAX_RUNS = 128  # runs of consecutive equal layers, each of which is compiled separately

Layers = Annotated[int, Range(1, 10_000)]
Width = Annotated[int, Range(1, 10**7)]
WidthOrNone = Annotated[int, Range(0, 10**7)]
Heads = Annotated[int, Range(1, 65_536)]
Context = Annotated[int, Range(1, 2**30)]
Multiplier = Annotated[float, Range(0, 1e6, above=True)]
MultiplierOrNone = Annotated[float, Range(0, 1e6)]
LayerNumbers = tuple[Annotated[int, Range(0, 10_000)], ...]


@dataclass(frozen=True)
class RopeScaling(Section):
    """RoPE scaling for longer contexts: slower rotations."""

    kind: Annotated[str, Choice(SCALINGS)] = "none"
    """linear divides every frequency by factor. llama3 divides only the low ones. yarn (arXiv
    2309.00071) divides those that turn less than beta_slow times within original_context, and
    interpolates between beta_slow and beta_fast. longrope (arXiv 2402.13753) divides frequency i by
    short_factors[i], or by long_factors[i] in documents longer than original_context. dynamic
    increases the base in documents longer than original_context, more in longer ones. alpha
    multiplies the base by factor ** (d / (d - 2)), where d is the rotated width."""
    factor: Positive = 1.0
    """The scaling factor."""
    low_freq_factor: Positive = 1.0
    """With llama3: frequencies that turn fewer times than this within original_context are divided
    fully."""
    high_freq_factor: Positive = 4.0
    """With llama3: frequencies that turn more times than this within original_context are
    unchanged."""
    original_context: Context = 8192
    """Context in tokens with which the model was trained before scaling."""
    beta_fast: Positive = 32.0
    """With yarn: turns within original_context above which a frequency is unchanged."""
    beta_slow: Positive = 1.0
    """With yarn: turns within original_context below which a frequency is divided fully."""
    attention_factor: Positive = 1.0
    """With yarn and longrope: factor on rotated queries and keys."""
    query_growth: MultiplierOrNone = 0.0
    """Queries are multiplied by 1 + query_growth ln(1 + floor(position / original_context))."""
    short_factors: tuple[Positive, ...] = ()
    """With longrope: one divisor per rotated pair, within original_context."""
    long_factors: tuple[Positive, ...] = ()
    """With longrope: one divisor per rotated pair, in longer documents."""

    @rule
    def _low_is_lower(self) -> Iterator[str]:
        if not self.low_freq_factor < self.high_freq_factor:
            yield (
                f"low_freq_factor={self.low_freq_factor}: must lie between 0 and"
                f" high_freq_factor={self.high_freq_factor}"
            )

    @rule
    def _factors_of_longrope(self) -> Iterator[str]:
        for key in ("short_factors", "long_factors"):
            if (self.kind == "longrope") != bool(getattr(self, key)):
                yield (
                    f"{key}: required for longrope, together with the other factors, and"
                    " not used by other kinds"
                )


@dataclass(frozen=True)
class MoEConfig(Section):
    """Which layers are mixtures, and how their tokens are routed."""

    experts: tuple[Annotated[int, Range(0, 4096)], ...]
    """Number of experts in each layer; 0 for a layer that stays dense."""
    k: Experts = 2
    """Experts per token, for top_k only: switch and sample_top1 use 1, soft uses all."""
    routing: Annotated[str, Choice(ROUTINGS)] = "top_k"
    """top_k: the k largest logits. switch: the largest, weighted by its probability. soft: all.
    sample_top1: in training one drawn by Gumbel-softmax, otherwise the largest."""
    first_routing: Annotated[str, Choice(ROUTINGS, empty=True)] = ""
    """Different routing for the first MoE layer; empty for the same (BTX pairs sample_top1 with
    soft there)."""
    renormalise: bool = True
    """With top_k: whether the gates of a token's experts are normalised to sum to one, or keep
    their values from the softmax over all experts."""
    d_ff: WidthOrNone = 0
    """Hidden units of an expert; 0 for as many as a dense layer."""
    shared_d_ff: WidthOrNone = 0
    """Hidden units of a shared expert that every token passes through, in addition to the routed
    ones; 0 for none."""
    shared_gate: bool = False
    """Whether the shared expert has a sigmoid gate."""
    anchor: bool = False
    """Whether the feed-forward that all experts started from is an additional expert, the last in
    the router (FlexOlmo, arXiv 2507.07024). Its logit is 0; each of the others has a bias. Routing
    and k count it, `experts` does not."""

    @rule
    def _gate_of_something(self) -> Iterator[str]:
        if self.shared_gate and not self.shared_d_ff:
            yield "shared_gate: needs a shared expert; give its shared_d_ff"

    @rule
    def _some_experts(self) -> Iterator[str]:
        if not any(self.experts):
            yield "experts: every layer has 0; leave config.model.moe out for a dense model"

    @rule
    def _k_of_them(self) -> Iterator[str]:
        if "top_k" not in (self.routing, self.first_routing):
            return
        beside = " and their anchor" if self.anchor else ""
        for layer, experts in enumerate(self.experts):
            if 0 < experts < self.k - self.anchor:
                yield (
                    f"k={self.k}: more than the {counted(experts, 'expert')} of layer"
                    f" {layer}{beside}; lower k or add experts"
                )
                return


@dataclass(frozen=True)
class LoRAConfig(Section):
    """Low-rank experts on frozen linear maps (MoLA, arXiv 2402.08562): h = W x + sum of g_i (alpha
    / rank) B_i A_i dropout(x) over the k experts chosen by a router of this layer and map. A layer
    with one expert has no router: plain LoRA."""

    allocation: str = "2468"
    """Experts per layer: digits over the depth (`2468`), a shape with its total (`triangle:160`;
    also inverted, hourglass, diamond, rectangle), or one number per layer (`2,2,4,4`)."""
    rank: tuple[Annotated[int, Range(1, 65_536)], ...] = (8,)
    """Rank of A and B: one number for all layers, or one per layer."""
    k: tuple[Experts, ...] = (2,)
    """Experts per token: one number for all layers, or one per layer."""
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 16.0
    """The product of B and A is multiplied by alpha / rank."""
    dropout: Share = 0.05
    """Dropout rate on the inputs of A in training."""
    targets: tuple[str, ...] = LORA_TARGETS
    """The adapted maps, from q, k, v, o, gate, up, down."""
    gating: Annotated[str, Choice(GATINGS)] = "top_k"
    """top_k: softmax, the k largest, renormalised (MoLA). sigmoid: the sigmoid of the router's
    logit, with one expert per layer, as PHATGOOSE (arXiv 2402.05859) trains a gate for a finished
    expert. cosine: softmax over the k router rows most parallel to x, both standardised, as
    PHATGOOSE then uses such gates."""

    @rule
    def _known_targets(self) -> Iterator[str]:
        if not self.targets:
            yield "targets: empty; known: " + ", ".join(LORA_TARGETS)
        for i, target in enumerate(self.targets):
            if target not in LORA_TARGETS:
                yield f"targets[{i}]={target!r}: {suggest(target, LORA_TARGETS)}"
            elif target in self.targets[:i]:
                yield f"targets[{i}]={target!r}: listed twice; leave one out"

    def specs(self, layers: int) -> tuple["LoRASpec | None", ...]:
        """The LoRA experts of each layer; None for a layer without any. Raises ConfigError when
        allocation, rank or k do not fit the depth or each other."""
        try:
            counts = experts_per_layer(self.allocation, layers)
        except UserError as error:
            raise ConfigError(str(error)) from None
        mistakes = Mistakes()
        rank, k = (self._per_layer(key, layers, mistakes) for key in ("rank", "k"))
        for layer, experts in enumerate(counts):
            many = f"the {counted(experts, 'expert')} of layer {layer}"
            if 0 < experts < k[layer]:
                mistakes.add(f"k={k[layer]}: more than {many}; lower k or give one k per layer")
            if self.gating == "sigmoid" and experts > 1:
                mistakes.add(f"gating='sigmoid': gates a single expert, not {many}")
            if mistakes.found:
                break
        mistakes.tell()
        return tuple(
            (
                LoRASpec(
                    experts,
                    rank[i],
                    k[i],
                    self.alpha / rank[i],
                    self.dropout,
                    self.targets,
                    self.gating,
                )
                if experts
                else None
            )
            for i, experts in enumerate(counts)
        )

    def _per_layer(self, key: str, layers: int, mistakes: Mistakes) -> tuple[int, ...]:
        values: tuple[int, ...] = getattr(self, key)
        if len(values) == layers:
            return values
        if len(values) != 1:
            mistakes.add(
                f"{key}: {len(values)} numbers for {layers} layers; give one number for all"
                " layers, or one per layer"
            )
        return (values or (1,))[:1] * layers


@dataclass(frozen=True)
class LoRASpec:
    """The LoRA experts of one layer. scale: alpha / rank."""

    experts: int
    rank: int
    k: int
    scale: float
    dropout: float
    targets: tuple[str, ...]
    gating: str

    @property
    def has_router(self) -> bool:
        return self.experts > 1 or self.gating == "sigmoid"


@dataclass(frozen=True)
class LayerSpec:
    """The definition of one layer; experts == 0 is a dense layer. Equal neighbours share one scan.

    d_ff: hidden size of the layer's feed-forward, or of each expert. renormalise, shared_d_ff,
    shared_gate, anchor: as in MoEConfig. activation, window: as in ModelConfig. rope_theta: 0 for a
    layer without RoPE.
    """

    experts: int = 0
    k: int = 0
    routing: str = ""
    renormalise: bool = True
    d_ff: int = 0
    shared_d_ff: int = 0
    shared_gate: bool = False
    anchor: bool = False
    lora: LoRASpec | None = None
    activation: str = "silu"
    window: int = 0
    rope_theta: float = 0.0
    rope_scaling: RopeScaling = RopeScaling()

    @property
    def routed(self) -> int:
        """Number of experts that a router chooses from, including the anchor, which is last."""
        return self.experts + self.anchor

    @property
    def sums_to_one(self) -> bool:
        """Whether the gates of a token with several experts sum to one; with an anchor they do
        not."""
        return self.renormalise and not self.anchor


@dataclass(frozen=True)
class ModelConfig(Section):
    """A model's architecture: everything that gives its parameters their meaning. Stored in every
    checkpoint."""

    vocab_size: Width
    """Number of rows of the embedding."""
    layers: Layers
    """Number of layers."""
    d_model: Width
    """Width of the residual stream."""
    d_ff: Width
    """Hidden units of a dense feed-forward."""
    heads: Heads
    """Query heads."""
    kv_heads: Heads
    """Key and value heads; must divide heads."""
    head_dim: Heads
    """Width of a head; must be even."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary embedding."""
    rope_scaling: RopeScaling = RopeScaling()
    """RoPE scaling for longer contexts."""
    rope_interleaved: bool = False
    """Whether RoPE rotates pairs of neighbouring elements (interleaved), rather than elements of
    the first half with those of the second."""
    rotary: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Fraction of each head, from its beginning, that RoPE rotates."""
    nope_layers: LayerNumbers = ()
    """Layers without RoPE, by number from 0."""
    biases: tuple[Annotated[str, Choice(LORA_TARGETS)], ...] = ()
    """Linear maps that have a bias, from q, k, v, o, gate, up, down."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    qk_norm_kind: Annotated[str, Choice(QK_NORMS)] = "head"
    """With qk_norm: over each head before RoPE (head), over the whole width before RoPE (width), or
    over each head after it (rotated)."""
    window: Annotated[int, Range(0, 2**30)] = 0
    """Sliding window: number of tokens that a token attends to, including itself; 0 for all
    preceding ones."""
    window_layers: LayerNumbers = ()
    """Layers with the window, by number from 0; empty for all."""
    window_theta: Annotated[float, Range(0, HUGE)] = 0.0
    """RoPE base of layers with a window, without scaling; 0 for the base and scaling of the
    others."""
    norm: Annotated[str, Choice(NORMS)] = "rms"
    """rms; rms_plus_one, which multiplies by 1 + scale; or layer, a LayerNorm without
    parameters."""
    norms: Annotated[str, Choice(NORM_PLACES)] = "before"
    """Position of norms: before attention and feed-forward, after them, or both."""
    norm_eps: Annotated[float, Range(0, 1)] = 1e-5
    """Epsilon added to the mean square in every norm."""
    activation: Annotated[str, Choice(ACTIVATIONS)] = "silu"
    """Activation function of the feed-forwards' gates."""
    embed_scale: Multiplier = 1.0
    """Factor on embeddings."""
    residual_scale: Multiplier = 1.0
    """Factor on the output of each block."""
    attention_scale: MultiplierOrNone = 0.0
    """Factor on attention scores; 0 for head_dim ** -0.5."""
    attention_cap: MultiplierOrNone = 0.0
    """Attention scores become cap * tanh(score / cap); 0 for no cap."""
    logits_divisor: Multiplier = 1.0
    """Logits are divided by this."""
    logits_cap: MultiplierOrNone = 0.0
    """Logits become cap * tanh(logit / cap); 0 for no cap."""
    tied_head: bool = False
    """Whether the head shares its weights with the embedding."""
    context: Context = 4096
    """Maximum sequence length in tokens."""
    moe: MoEConfig | None = None
    """Which layers are mixtures; None for a dense model."""
    lora: LoRAConfig | None = None
    """LoRA experts; None for a model without any."""

    @rule
    def _heads_divide(self) -> Iterator[str]:
        if self.heads % self.kv_heads:
            yield (
                f"heads={self.heads}: not divisible by kv_heads={self.kv_heads}, as each key"
                " head serves heads / kv_heads query heads"
            )

    @rule
    def _head_is_even(self) -> Iterator[str]:
        if self.head_dim % 2:
            yield f"head_dim={self.head_dim}: must be even, as RoPE rotates pairs"
        elif (size := int(self.head_dim * self.rotary)) % 2 or not size:
            yield (
                f"rotary={self.rotary}: rotates {size} of head_dim={self.head_dim}; RoPE"
                " rotates pairs, so that must be even and above 0"
            )

    @rule
    def _factors_fit(self) -> Iterator[str]:
        pairs = int(self.head_dim * self.rotary) // 2
        for key in ("short_factors", "long_factors"):
            count = len(getattr(self.rope_scaling, key))
            if count not in (0, pairs):
                yield (
                    f"rope_scaling.{key}: {count} numbers, but one for each of {pairs} rotated"
                    " pairs is needed"
                )

    @rule
    def _layers_are_there(self) -> Iterator[str]:
        for key in ("nope_layers", "window_layers"):
            numbers = getattr(self, key)
            if list(numbers) != sorted(set(numbers)) or (numbers and numbers[-1] >= self.layers):
                yield (
                    f"{key}={numbers}: must be layer numbers below {self.layers}, in"
                    " ascending order"
                )

    @rule
    def _kind_of_something(self) -> Iterator[str]:
        if not self.qk_norm and self.qk_norm_kind != "head":
            yield f"qk_norm_kind={self.qk_norm_kind!r}: needs qk_norm (norms on queries and keys)"

    @rule
    def _biases_fit(self) -> Iterator[str]:
        if len(set(self.biases)) < len(self.biases):
            yield f"biases={self.biases}: one is listed twice; leave it out"
        inside = [name for name in self.biases if name in ("gate", "up", "down")]
        if self.moe and inside:
            yield (
                f"biases: {', '.join(inside)} in a mixture's experts cannot have biases;"
                " leave them out"
            )

    @rule
    def _counts_fit(self) -> Iterator[str]:
        if self.moe is not None and len(self.moe.experts) != self.layers:
            yield (
                f"moe.experts: {len(self.moe.experts)} counts for layers={self.layers}; give one"
                " count per layer (0 for a dense layer)"
            )

    @rule
    def _lora_fits(self) -> Iterator[str]:
        if self.lora is None:
            return
        try:
            self.lora.specs(self.layers)
        except ConfigError as error:
            yield from (f"lora.{told}" for told in error.args)
        inside = [target for target in self.lora.targets if target in ("gate", "up", "down")]
        if self.moe and inside:
            yield (
                f"lora.targets: {', '.join(inside)} of a mixture's experts cannot be adapted;"
                " use its attention (q, k, v, o)"
            )

    @rule
    def _possible(self) -> Iterator[str]:
        """Reject models that are too large. Sizes come from closed formulas; not even shapes are
        created."""
        counts = self.moe.experts if self.moe is not None else (1,) * self.layers
        lora = ((0, 0),) * self.layers
        if self.lora is not None:
            try:
                specs = self.lora.specs(self.layers)
            except ConfigError:
                return  # reported by another rule
            lora = tuple((spec.experts, spec.rank) if spec else (0, 0) for spec in specs)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        total = self.d_model * self.vocab_size * (1 if self.tied_head else 2)
        total += 2 * self.layers * self.d_model * (queries + keys)
        widths = [self.d_ff] * self.layers
        if self.moe is not None:
            widths = [
                (count + self.moe.anchor) * (self.moe.d_ff or self.d_ff) + self.moe.shared_d_ff
                if count
                else self.d_ff
                for count in counts
            ]
        total += sum(widths) * 3 * self.d_model
        if self.lora is not None:
            ends = {
                "q": self.d_model + queries,
                "k": self.d_model + keys,
                "v": self.d_model + keys,
                "o": queries + self.d_model,
            }
            width = sum(ends.get(target, self.d_model + self.d_ff) for target in self.lora.targets)
            total += sum(experts * rank for experts, rank in lora) * width
        if total > MAX_PARAMETERS:
            yield (
                f"layers={self.layers}: with d_model={self.d_model}, d_ff={self.d_ff} and"
                f" {max(counts)} experts per layer, that is {total:.2g} parameters; lower one"
                f" of them, at most {MAX_PARAMETERS:.0e} parameters are supported"
            )
        if self.moe is not None and sum(counts) > MAX_EXPERTS:
            yield (
                f"moe.experts: {sum(counts)} experts over layers={self.layers}; lower it, at"
                f" most {MAX_EXPERTS} are supported"
            )
        window, nope = set(self.window_layers), set(self.nope_layers)
        sees = [(layer in window, layer in nope) for layer in range(self.layers)]
        pairs = list(zip(counts, lora, sees, strict=False))
        runs = sum(pairs[i] != pairs[i - 1] for i in range(1, len(pairs))) + 1
        if runs > MAX_RUNS:
            yield (
                f"layers={self.layers}: {runs} runs of equal layers, each compiled separately,"
                f" but at most {MAX_RUNS} are supported; give neighbouring layers the same"
                " experts"
            )

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec per layer, first to last."""
        adapted = self.lora.specs(self.layers) if self.lora else (None,) * self.layers
        return tuple(
            dataclasses.replace(
                spec, lora=lora, activation=self.activation, **self._positions(layer)
            )
            for layer, (spec, lora) in enumerate(zip(self._moe_specs(), adapted, strict=True))
        )

    def _positions(self, layer: int) -> dict[str, Any]:
        """window, rope_theta and rope_scaling of a layer's LayerSpec."""
        window, scaling = 0, self.rope_scaling
        theta = self.rope_theta
        if self.window and (not self.window_layers or layer in self.window_layers):
            window = self.window
            if self.window_theta:
                theta, scaling = self.window_theta, RopeScaling()
        if layer in self.nope_layers:
            theta, scaling = 0.0, RopeScaling()
        return {"window": window, "rope_theta": theta, "rope_scaling": scaling}

    def _moe_specs(self) -> tuple[LayerSpec, ...]:
        if self.moe is None:
            return (LayerSpec(d_ff=self.d_ff),) * self.layers
        specs: list[LayerSpec] = []
        first = True
        for experts in self.moe.experts:
            if not experts:
                specs.append(LayerSpec(d_ff=self.d_ff))
                continue
            routing = (
                self.moe.first_routing if first and self.moe.first_routing else self.moe.routing
            )
            k = {"top_k": self.moe.k, "soft": experts + self.moe.anchor}.get(routing, 1)
            specs.append(
                LayerSpec(
                    experts,
                    k,
                    routing,
                    self.moe.renormalise or routing != "top_k",
                    self.moe.d_ff or self.d_ff,
                    self.moe.shared_d_ff,
                    self.moe.shared_gate,
                    self.moe.anchor,
                )
            )
            first = False
        return tuple(specs)

    def runs(self) -> tuple[tuple[str, int, LayerSpec], ...]:
        """The layers as runs of equal layers: (parameter name, length, spec). Most models have a
        single run, `layers_0`."""
        runs: list[tuple[int, LayerSpec]] = []
        for spec in self.layer_specs():
            if runs and runs[-1][1] == spec:
                runs[-1] = (runs[-1][0] + 1, spec)
            else:
                runs.append((1, spec))
        return tuple((f"layers_{i}", length, spec) for i, (length, spec) in enumerate(runs))

    def dense(self) -> "ModelConfig":
        """This model without experts, which is the architecture of each branch."""
        return dataclasses.replace(self, moe=None)

    @property
    def has_anchor(self) -> bool:
        return self.moe is not None and self.moe.anchor

    @property
    def is_branch(self) -> bool:
        """Whether every layer is one expert and its anchor."""
        return self.moe is not None and self.moe.anchor and set(self.moe.experts) == {1}

    def base(self) -> "ModelConfig":
        """This model without LoRA experts."""
        return dataclasses.replace(self, lora=None)
