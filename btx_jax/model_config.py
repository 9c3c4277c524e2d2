"""What a model is: architecture, mixtures, LoRA experts. Travels inside every checkpoint; an
impossible value raises ConfigError."""

import dataclasses
from dataclasses import dataclass

from btx_jax.allocation import experts_per_layer
from btx_jax.errors import ConfigError, UserError, one_of, require

ROUTINGS = ("top_k", "switch", "soft", "sample_top1")
GATINGS = ("top_k", "sigmoid", "cosine")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class RopeScaling:
    """Longer contexts by slower rotations. `linear` divides every frequency by factor; `llama3`
    only the low ones."""

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        one_of("kind", self.kind, ("none", "linear", "llama3"))
        require(self.factor > 0, f"factor={self.factor}: must be positive")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor}: must lie between 0 and"
            f" high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Which layers are mixtures, and how their tokens are routed.

    experts: one count per layer, 0 for a layer that stays dense.
    k: experts per token (top_k only; switch and sample_top1 use 1, soft uses all).
    first_routing: another routing for the first MoE layer; "" for the same (BTX pairs sample_top1
    with soft there).
    """

    experts: tuple[int, ...]
    k: int = 2
    routing: str = "top_k"
    first_routing: str = ""

    def __post_init__(self):
        one_of("routing", self.routing, ROUTINGS)
        if self.first_routing:
            one_of("first_routing", self.first_routing, ROUTINGS)
        require(
            any(self.experts),
            "experts: no layer has any; leave config.model.moe out for a dense model",
        )
        require(self.k >= 1, f"k={self.k}: must be at least 1")
        for layer, experts in enumerate(self.experts):
            require(experts >= 0, f"experts: {experts} in layer {layer}; must be 0 (dense) or more")
            if experts and "top_k" in (self.routing, self.first_routing):
                require(
                    self.k <= experts,
                    f"k={self.k}: more than the {experts} experts of layer {layer}; lower k or add"
                    " experts",
                )


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank experts beside frozen linear maps (MoLA, arXiv 2402.08562): h = W x + sum of g_i
    (alpha / rank) B_i A_i dropout(x) over the k experts that a router of this layer and map
    chooses. A layer with one expert has no router: plain LoRA.

    allocation: experts per layer, as digits over the depth (`2468`), a shape with its total
    (`triangle:160`; also inverted, hourglass, diamond, rectangle) or one number a layer
    (`2,2,4,4`).
    rank, k: one number for all layers, or one per layer.
    targets: which maps, of q, k, v, o, gate, up, down.
    gating: top_k = softmax, k largest, renormalised (MoLA). sigmoid = sigmoid of the router's
        logit, one expert a layer: how PHATGOOSE (arXiv 2402.05859) trains a gate behind a finished
        expert. cosine = softmax over the k routers' rows most parallel to x, both
        standardised: how it uses such gates.
    """

    allocation: str = "2468"
    rank: tuple[int, ...] = (8,)
    k: tuple[int, ...] = (2,)
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = LORA_TARGETS
    gating: str = "top_k"

    def __post_init__(self):
        one_of("gating", self.gating, GATINGS)
        require(bool(self.targets), "targets: none named; known: " + ", ".join(LORA_TARGETS))
        for i, target in enumerate(self.targets):
            one_of(f"targets[{i}]", target, LORA_TARGETS)
            require(target not in self.targets[:i], f"targets[{i}]={target!r}: named twice")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}: must lie in [0, 1)")
        require(self.alpha > 0, f"alpha={self.alpha}: must be positive")
        for key in ("rank", "k"):
            for value in getattr(self, key):
                require(value >= 1, f"{key}={value}: must be at least 1")

    def specs(self, layers: int) -> tuple["LoRASpec | None", ...]:
        """What each layer gets. Raises ConfigError when allocation, rank or k do not fit the depth
        or each other."""
        try:
            counts = experts_per_layer(self.allocation, layers)
        except UserError as error:
            raise ConfigError(str(error)) from None
        rank, k = (self._per_layer(key, layers) for key in ("rank", "k"))
        for layer, experts in enumerate(counts):
            many = f"the {experts} expert{'s' if experts > 1 else ''} of layer {layer}"
            require(
                k[layer] <= experts or not experts,
                f"k={k[layer]}: more than {many}; lower k or give one k per layer",
            )
            require(
                self.gating != "sigmoid" or experts <= 1,
                f"gating='sigmoid': a gate behind one expert, not behind {many}",
            )
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

    def _per_layer(self, key: str, layers: int) -> tuple[int, ...]:
        values: tuple[int, ...] = getattr(self, key)
        require(
            len(values) in (1, layers),
            f"{key}: {len(values)} numbers for {layers} layers; give one for all or one per layer",
        )
        return values * layers if len(values) == 1 else values


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
    """What one layer is: experts == 0 is a dense layer. Equal neighbours share one scan."""

    experts: int = 0
    k: int = 0
    routing: str = ""
    lora: LoRASpec | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model's architecture: everything that gives its parameters their meaning. Travels inside
    every checkpoint."""

    vocab_size: int
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tied_head: bool = False
    context: int = 4096
    moe: MoEConfig | None = None
    lora: LoRAConfig | None = None

    def __post_init__(self):
        for key in (
            "vocab_size",
            "layers",
            "d_model",
            "d_ff",
            "heads",
            "kv_heads",
            "head_dim",
            "context",
        ):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads}: not divisible by kv_heads={self.kv_heads}; each key head serves"
            " heads / kv_heads query heads",
        )
        require(
            self.head_dim % 2 == 0, f"head_dim={self.head_dim}: must be even, RoPE rotates pairs"
        )
        if self.moe is not None:
            require(
                len(self.moe.experts) == self.layers,
                f"moe.experts: {len(self.moe.experts)} counts for layers={self.layers}; give one"
                " count per layer (0 for a dense layer)",
            )
        if self.lora is not None:
            self.lora.specs(self.layers)
            inside = [target for target in self.lora.targets if target in ("gate", "up", "down")]
            require(
                not self.moe or not inside,
                f"lora.targets: {', '.join(inside)} of a mixture's experts cannot be adapted, its"
                " attention can (q, k, v, o)",
            )

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec per layer, first to last."""
        adapted = self.lora.specs(self.layers) if self.lora else (None,) * self.layers
        return tuple(
            dataclasses.replace(spec, lora=lora)
            for spec, lora in zip(self._moe_specs(), adapted, strict=True)
        )

    def _moe_specs(self) -> tuple[LayerSpec, ...]:
        if self.moe is None:
            return (LayerSpec(),) * self.layers
        specs: list[LayerSpec] = []
        first = True
        for experts in self.moe.experts:
            if not experts:
                specs.append(LayerSpec())
                continue
            routing = (
                self.moe.first_routing if first and self.moe.first_routing else self.moe.routing
            )
            k = {"top_k": self.moe.k, "soft": experts}.get(routing, 1)
            specs.append(LayerSpec(experts, k, routing))
            first = False
        return tuple(specs)

    def runs(self) -> tuple[tuple[str, int, LayerSpec], ...]:
        """The stack as runs of equal layers: (parameter name, length, spec). One run, `layers_0`,
        in most models."""
        runs: list[tuple[int, LayerSpec]] = []
        for spec in self.layer_specs():
            if runs and runs[-1][1] == spec:
                runs[-1] = (runs[-1][0] + 1, spec)
            else:
                runs.append((1, spec))
        return tuple((f"layers_{i}", length, spec) for i, (length, spec) in enumerate(runs))

    def dense(self) -> "ModelConfig":
        """The same model without experts: what each branch is."""
        return dataclasses.replace(self, moe=None)

    def base(self) -> "ModelConfig":
        """The same model without LoRA experts."""
        return dataclasses.replace(self, lora=None)
