"""The schema of every config: frozen dataclasses, checked before anything is compiled.

An impossible value raises `ConfigError` with one line: the key, what is wrong, and what to do. config_dict.py turns configs into plain
dictionaries and back.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from btx_jax.allocation import experts_per_layer
from btx_jax.errors import UserError

ROUTINGS = ("top_k", "switch", "soft", "sample_top1")
DISPATCHES = ("einsum", "ragged")
REMAT_POLICIES = ("none", "full", "attention", "ffn")
KERNELS = ("auto", "xla", "pallas", "pallas_interpret")
DTYPES = ("float32", "bfloat16")
FROZEN = ("", "experts", "all_but_routers", "base")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
GATINGS = ("top_k", "sigmoid", "cosine")
MIX_METHODS = ("btx", "average", "split", "blend")
ENSEMBLE_WEIGHTS = ("tf_idf", "bayes_uniform", "bayes_updating")
TASKS = ("multiple_choice", "exact_match", "code")
STAGES = ("prepare", "train", "mix", "evaluate", "report", "pipeline")


class ConfigError(UserError):
    """A config that cannot run. The message starts with the key."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value!r}: {suggest(value, allowed)}")


def suggest(word: str, known: typing.Iterable[str]) -> str:
    known = tuple(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)


@dataclass(frozen=True)
class RopeScaling:
    """Longer contexts by slower rotations. `linear` divides every frequency by factor; `llama3` only the low ones."""

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _one_of("kind", self.kind, ("none", "linear", "llama3"))
        _require(self.factor >= 1, f"factor={self.factor}: must be at least 1")
        _require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor}: must lie between 0 and high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Which layers are mixtures, and how their tokens are routed.

    experts: one count per layer, 0 for a layer that stays dense.
    k: experts per token (top_k only; switch and sample_top1 use 1, soft uses all).
    first_routing: another routing for the first MoE layer; "" for the same (BTX pairs sample_top1 with soft there).
    """

    experts: tuple[int, ...]
    k: int = 2
    routing: str = "top_k"
    first_routing: str = ""

    def __post_init__(self):
        _one_of("routing", self.routing, ROUTINGS)
        if self.first_routing:
            _one_of("first_routing", self.first_routing, ROUTINGS)
        _require(any(self.experts), "experts: no layer has any; leave config.model.moe out for a dense model")
        _require(self.k >= 1, f"k={self.k}: must be at least 1")
        for layer, experts in enumerate(self.experts):
            _require(experts >= 0, f"experts: {experts} in layer {layer}; must be 0 (dense) or more")
            if experts and "top_k" in (self.routing, self.first_routing):
                _require(self.k <= experts, f"k={self.k}: more than the {experts} experts of layer {layer}; lower k or add experts")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank experts beside frozen linear maps (MoLA, arXiv 2402.08562): h = W x + sum of g_i (alpha / rank) B_i A_i dropout(x) over the
    k experts that a router of this layer and map chooses. A layer with one expert has no router: plain LoRA.

    allocation: experts per layer, as digits over the depth (`2468`), a shape with its total (`triangle:160`; also inverted, hourglass,
    diamond, rectangle) or one number a layer (`2,2,4,4`).
    rank, k: one number for all layers, or one per layer.
    targets: which maps, of q, k, v, o, gate, up, down.
    gating: top_k = softmax, k largest, renormalised (MoLA). sigmoid = sigmoid of the router's logit, one expert a layer: how PHATGOOSE
        (arXiv 2402.05859) trains a gate behind a finished expert. cosine = softmax over the k routers' rows most parallel to x, both
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
        _one_of("gating", self.gating, GATINGS)
        _require(bool(self.targets), "targets: none named; known: " + ", ".join(LORA_TARGETS))
        for i, target in enumerate(self.targets):
            _one_of(f"targets[{i}]", target, LORA_TARGETS)
            _require(target not in self.targets[:i], f"targets[{i}]={target!r}: named twice")
        _require(0 <= self.dropout < 1, f"dropout={self.dropout}: must lie in [0, 1)")
        _require(self.alpha > 0, f"alpha={self.alpha}: must be positive")
        for key in ("rank", "k"):
            for value in getattr(self, key):
                _require(value >= 1, f"{key}={value}: must be at least 1")

    def specs(self, layers: int) -> tuple["LoRASpec | None", ...]:
        """What each layer gets. Raises ConfigError when allocation, rank or k do not fit the depth or each other."""
        try:
            counts = experts_per_layer(self.allocation, layers)
        except UserError as error:
            raise ConfigError(str(error)) from None
        rank, k = (self._per_layer(key, layers) for key in ("rank", "k"))
        for layer, experts in enumerate(counts):
            many = f"the {experts} expert{'s' if experts > 1 else ''} of layer {layer}"
            _require(k[layer] <= experts or not experts, f"k={k[layer]}: more than {many}; lower k or give one k per layer")
            _require(self.gating != "sigmoid" or experts <= 1, f"gating='sigmoid': a gate behind one expert, not behind {many}")
        return tuple(
            LoRASpec(experts, rank[i], k[i], self.alpha / rank[i], self.dropout, self.targets, self.gating) if experts else None
            for i, experts in enumerate(counts)
        )

    def _per_layer(self, key: str, layers: int) -> tuple[int, ...]:
        values: tuple[int, ...] = getattr(self, key)
        _require(len(values) in (1, layers), f"{key}: {len(values)} numbers for {layers} layers; give one for all or one per layer")
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
    """A model's architecture: everything that gives its parameters their meaning. Travels inside every checkpoint."""

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
        for key in ("vocab_size", "layers", "d_model", "d_ff", "heads", "kv_heads", "head_dim", "context"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads}: not divisible by kv_heads={self.kv_heads}; each key head serves heads / kv_heads query heads",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim}: must be even, RoPE rotates pairs")
        if self.moe is not None:
            _require(
                len(self.moe.experts) == self.layers,
                f"moe.experts: {len(self.moe.experts)} counts for layers={self.layers}; give one count per layer (0 for a dense layer)",
            )
        if self.lora is not None:
            self.lora.specs(self.layers)
            inside = [target for target in self.lora.targets if target in ("gate", "up", "down")]
            _require(
                not self.moe or not inside,
                f"lora.targets: {', '.join(inside)} of a mixture's experts cannot be adapted, its attention can (q, k, v, o)",
            )

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec per layer, first to last."""
        adapted = self.lora.specs(self.layers) if self.lora else (None,) * self.layers
        return tuple(dataclasses.replace(spec, lora=lora) for spec, lora in zip(self._moe_specs(), adapted, strict=True))

    def _moe_specs(self) -> tuple[LayerSpec, ...]:
        if self.moe is None:
            return (LayerSpec(),) * self.layers
        specs: list[LayerSpec] = []
        first = True
        for experts in self.moe.experts:
            if not experts:
                specs.append(LayerSpec())
                continue
            routing = self.moe.first_routing if first and self.moe.first_routing else self.moe.routing
            k = {"top_k": self.moe.k, "soft": experts}.get(routing, 1)
            specs.append(LayerSpec(experts, k, routing))
            first = False
        return tuple(specs)

    def runs(self) -> tuple[tuple[str, int, LayerSpec], ...]:
        """The stack as runs of equal layers: (parameter name, length, spec). One run, `layers_0`, in most models."""
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


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run. Changes speed and memory; the results only through rounding and, for einsum dispatch, dropped tokens.

    dtype: of activations and matmuls; parameters, norms, softmaxes, router and losses are float32 always.
    remat: what the backward pass finds in memory and need not compute again. full: each layer's input. attention: also queries, keys,
        values, the attention's output and the sum behind it. ffn: also the gate and up products. none: everything.
    kernels: auto = pallas on a TPU, else xla. pallas = splash attention (where the sequence is a multiple of 128) and megablox for ragged
        dispatch; pallas_interpret runs those on any device, slowly.
    unroll: layers unrolled per step of the scan; 1 compiles fastest, all layers runs up to a quarter faster on a CPU.
    dispatch: einsum (capacity, groups) or ragged (dropless).
    capacity_factor: slots per expert = factor x k x group_size / experts.
    group_size: tokens routed together; dispatch costs 2 x group_size / (3 x d_ff) of the experts' FLOPs.
    loss_chunk: tokens whose logits exist at one time in the loss.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    kernels: str = "auto"
    unroll: int = 1
    dispatch: str = "einsum"
    capacity_factor: float = 1.25
    group_size: int = 512
    loss_chunk: int = 1024

    def __post_init__(self):
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("remat", self.remat, REMAT_POLICIES)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("dispatch", self.dispatch, DISPATCHES)
        _require(self.capacity_factor > 0, f"capacity_factor={self.capacity_factor}: must be positive")
        for key in ("unroll", "group_size", "loss_chunk"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults are BTX's; what the paper leaves out (betas, clip) is Llama 2's.

    batch_size: sequences per step over all devices. accumulate: micro-batches it is split into, one after another.
    balance_weight: alpha of the load-balance loss. z_loss_weight: of the router z-loss (ST-MoE), 0 to leave it out.
    eval_every: steps between held-out losses on eval_rows rows a domain, 0 for none.
    frozen: what is not trained and has no optimizer state: nothing (""), the experts' feed-forwards, all but the routers, or the base
        under LoRA experts. frozen_dtype: what is frozen is kept in it.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    z_loss_weight: float = 0.0
    eval_every: int = 0
    eval_rows: int = 64
    frozen: str = ""
    frozen_dtype: str = "float32"

    def __post_init__(self):
        _one_of("frozen", self.frozen, FROZEN)
        _one_of("frozen_dtype", self.frozen_dtype, DTYPES)
        for key in ("steps", "batch_size", "accumulate", "eval_rows"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("warmup_steps", "eval_every", "weight_decay", "balance_weight", "z_loss_weight"):
            _require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}: must not be negative")
        for key in ("learning_rate", "clip_norm", "eps"):
            _require(getattr(self, key) > 0, f"{key}={getattr(self, key)}: must be positive")
        _require(self.batch_size % self.accumulate == 0, f"accumulate={self.accumulate}: does not divide batch_size={self.batch_size}")
        _require(self.warmup_steps <= self.steps, f"warmup_steps={self.warmup_steps}: more than steps={self.steps}; lower it")


@dataclass(frozen=True)
class FormatConfig:
    """How an item of JSON lines becomes a document of which the answers alone are learnt.

    prompt, answer: format strings over the item's fields; `{choice}` is choices[gold], where an item has both.
    messages: instead, the field of a chat, [{role, content}, ...], which goes through the tokenizer's chat template; what assistants say is
        learnt. cutoff: tokens of a document at most, what is behind is cut off; 0 for data.sequence_length.
    """

    prompt: str = ""
    answer: str = ""
    messages: str = ""
    cutoff: int = 0

    def __post_init__(self):
        _require(bool(self.messages) != bool(self.answer), "answer: give prompt and answer, or messages, and not both")
        _require(self.cutoff >= 0, f"cutoff={self.cutoff}: must not be negative")


@dataclass(frozen=True)
class DataConfig:
    """Text and its tokenizer.

    train, heldout: comma-separated `WHAT[#FIELD][:WEIGHT]`, WHAT a name from domains, a file, a glob, `tfds:NAME` or `demo:NAME`.
        `FILE#@NAME` names one of formats.
    heldout: domains whose held-out documents are measured; "" for those of train.
    domains: name -> sources in the same notation.
    tokenizer: a sentencepiece .model, an HF tokenizer.json, a directory with one, or `demo:`; "" for the init checkpoint's.
    heldout_fraction: share of documents, chosen by a hash of their text, that no training run ever sees.
    cache: where tokenised data sets are kept, for any run that asks for the same text and tokenizer.
    """

    train: str
    heldout: str = ""
    domains: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    formats: Mapping[str, FormatConfig] = field(default_factory=dict)
    sequence_length: int = 4096
    heldout_fraction: float = 0.01
    cache: str = "runs/data"

    def __post_init__(self):
        _require(self.sequence_length >= 2, f"sequence_length={self.sequence_length}: must be at least 2")
        _require(0 <= self.heldout_fraction < 1, f"heldout_fraction={self.heldout_fraction}: must lie in [0, 1)")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one axis means all that remain. The batch is split over data, fsdp and expert."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            _require(size >= 1 or size == -1, f"{axis}={size}: must be at least 1, or -1 for all remaining devices")
        _require(list(sizes.values()).count(-1) <= 1, f"more than one axis is -1 in {sizes}: name the size of all but one")

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """(data, fsdp, expert, tensor) on this many devices. Raises ConfigError when they do not fit."""
        sizes = [self.data, self.fsdp, self.expert, self.tensor]
        fixed = 1
        for size in sizes:
            fixed *= size if size > 0 else 1
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        data, fsdp, expert, tensor = sizes
        if data * fsdp * expert * tensor != devices:
            raise ConfigError(
                f"config.mesh: data={self.data} fsdp={self.fsdp} expert={self.expert} tensor={self.tensor} does not fit "
                f"{devices} device{'s' if devices > 1 else ''}; the product must be {devices} (-1 takes what remains)"
            )
        return data, fsdp, expert, tensor


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints. keep: how many of the newest stay; the last step is always saved."""

    every: int = 1000
    keep: int = 2

    def __post_init__(self):
        for key in ("every", "keep"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True)
class MixConfig:
    """What becomes one model: the checkpoints, in expert order. One checkpoint with copies > 1 is sparse upcycling.

    method: btx = each feed-forward becomes an expert. split = each is cut into `chunks` along d_ff, and each chunk becomes an expert.
    blend = each is cut into as many chunks as there are checkpoints, and expert n is the n-th chunk of every one. average = no experts:
    the mean of all parameters, a dense model. What is no feed-forward is averaged always.
    k, routing, first_routing: of every layer of the mixture, as in MoEConfig. router_std: of the normal router initialisation.
    """

    experts: tuple[str, ...]
    copies: int = 1
    method: str = "btx"
    chunks: int = 1
    k: int = 2
    routing: str = "top_k"
    first_routing: str = ""
    router_std: float = 0.02

    def __post_init__(self):
        total = len(self.experts) * self.copies * self.chunks
        _one_of("method", self.method, MIX_METHODS)
        _require(self.copies >= 1, f"copies={self.copies}: must be at least 1")
        _require(
            self.chunks > 1 if self.method == "split" else self.chunks == 1,
            f"chunks={self.chunks}: with method='split' at least 2, with the others 1",
        )
        _require(total >= 1, "experts: none named; list the checkpoints to mix")
        _require(self.router_std > 0, f"router_std={self.router_std}: must be positive, a zero router always picks experts 0..k-1")
        MoEConfig((total,), self.k, self.routing, self.first_routing)


@dataclass(frozen=True)
class EnsembleConfig:
    """Branch-Train-Merge: dense models that answer together.

    experts: name among evaluate.models -> the domain of data.domains (or of data.heldout) whose training text is its profile.
    weights: tf_idf (the `top` experts by cosine with the document so far), bayes_uniform or bayes_updating (posterior given the document
    so far; `top` is not used).
    """

    experts: Mapping[str, str]
    weights: str = "tf_idf"
    top: int = 2

    def __post_init__(self):
        _one_of("weights", self.weights, ENSEMBLE_WEIGHTS)
        _require(len(self.experts) >= 2, "experts: an ensemble needs two or more")
        _require(1 <= self.top <= len(self.experts), f"top={self.top}: there are {len(self.experts)} experts")


@dataclass(frozen=True)
class TaskConfig:
    """A test set: `file` of JSON lines, `$BTX_DATA_DIR` and the like expanded. limit: its first items only, 0 for all.

    kind: multiple_choice (fields choices, gold: the likeliest choice behind the prompt), exact_match (field answer: the last number of
    what is generated, or its text) or code (HumanEval's fields: what is generated passes the item's tests).
    heldout_fraction: above 0, of multiple_choice, only the items whose prompt and right choice no training run with that
        data.heldout_fraction has seen.
    prompt: a format string over an item's fields. shots: solved examples in front, from the beginning of shots_file.
    max_tokens, temperature, top_p, stop: of generation. samples: programs per item; pass_at: the k of pass@k; seconds: CPU time of each.
    """

    kind: str
    file: str
    prompt: str
    limit: int = 0
    heldout_fraction: float = 0.0
    shots: int = 0
    shots_file: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    pass_at: tuple[int, ...] = (1,)
    seconds: int = 10

    def __post_init__(self):
        _one_of("kind", self.kind, TASKS)
        for key in ("limit", "shots"):
            _require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}: must not be negative")
        for key in ("max_tokens", "samples", "seconds"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        _require(self.temperature >= 0, f"temperature={self.temperature}: must not be negative")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}: must lie in (0, 1]")
        _require(0 <= self.heldout_fraction < 1, f"heldout_fraction={self.heldout_fraction}: must lie in [0, 1)")
        _require(
            not self.heldout_fraction or self.kind == "multiple_choice",
            f"heldout_fraction={self.heldout_fraction}: for kind='multiple_choice' only",
        )
        _require(bool(self.shots_file) or not self.shots, "shots_file: missing, and shots are asked for")
        _require(all(1 <= k <= self.samples for k in self.pass_at), f"pass_at={self.pass_at}: each must lie in 1 .. samples={self.samples}")
        several = self.kind == "code" and self.samples > 1
        _require(not several or self.temperature > 0, "temperature: 0 gives the same program every time; raise it or set samples to 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """models: name -> checkpoint, each measured on every domain of data.heldout, where there is a data section. rows: at most this many
    a domain, 0 for all.

    tasks: name -> test set, each tried with every model. ensembles: name -> models that answer together, by their losses alone.
    shown_tokens: of each domain's held-out text, kept with the experts that every mixture chose for them; texts: name -> further text
    to keep so.
    """

    models: Mapping[str, str]
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    ensembles: Mapping[str, EnsembleConfig] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    shown_tokens: int = 160
    rows: int = 0
    batch_size: int = 8

    def __post_init__(self):
        _require(bool(self.models), "models: none named; map a name to a checkpoint")
        _require(self.rows >= 0, f"rows={self.rows}: must not be negative")
        _require(self.shown_tokens >= 0, f"shown_tokens={self.shown_tokens}: must not be negative")
        _require(self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1")
        for name, ensemble in self.ensembles.items():
            _require(name not in self.models, f"ensembles.{name}: a model has that name already")
            for expert in ensemble.experts:
                _require(expert in self.models, f"ensembles.{name}.experts: no model {expert!r}; {suggest(expert, self.models)}")


@dataclass(frozen=True)
class ReportConfig:
    """evaluate: directory of the evaluate stage. runs: name -> directory of every stage whose curves and times are shown. others:
    directories of the evaluate stages of the same arms with other seeds; with them, arms are compared in pairs. continual: `MODEL:TASK`
    in the order of training, each model having just learnt its task; the scores on all of them give OP, PD and BWT."""

    evaluate: str
    runs: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    continual: tuple[str, ...] = ()

    def __post_init__(self):
        for i, pair in enumerate(self.continual):
            _require(all(pair.partition(":")), f"continual[{i}]={pair!r}: must be MODEL:TASK")
        _require(len(self.continual) != 1, "continual: one task alone; name two or more, in the order of training")


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a pipeline. In its config, `@NAME` stands for the working directory of stage NAME, which must be in needs."""

    config: "Config"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """One run. Sections that the stage does not use are left out."""

    stage: str
    init: str = ""
    rng_seed: int = 0
    model: ModelConfig | None = None
    lora: LoRAConfig | None = None
    compute: ComputeConfig | None = None
    train: TrainConfig | None = None
    data: DataConfig | None = None
    mesh: MeshConfig | None = None
    checkpoint: CheckpointConfig | None = None
    mix: MixConfig | None = None
    evaluate: EvaluateConfig | None = None
    report: ReportConfig | None = None
    pipeline: Mapping[str, PipelineStage] | None = None

    def __post_init__(self):
        _one_of("stage", self.stage, STAGES)
        _require(self.rng_seed >= 0, f"rng_seed={self.rng_seed}: must not be negative")
        for section in _SECTIONS[self.stage]:
            _require(getattr(self, section) is not None, f"{section}: missing, and stage {self.stage!r} needs it")
        if self.evaluate is not None and self.data is None:
            _require(not self.evaluate.ensembles, "data: missing, and evaluate.ensembles need held-out text")
            _require(bool(self.evaluate.tasks), "data: missing, and evaluate.tasks is empty: nothing to evaluate on")
        if self.stage == "pipeline":
            assert self.pipeline is not None
            for name, stage in self.pipeline.items():
                for need in stage.needs:
                    _require(need in self.pipeline, f"pipeline.{name}.needs: no stage {need!r}; {suggest(need, self.pipeline)}")


_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("data",),
    "train": ("train", "data", "compute", "mesh", "checkpoint"),
    "mix": ("mix", "mesh"),
    "evaluate": ("evaluate", "compute", "mesh"),
    "report": ("report",),
    "pipeline": ("pipeline",),
}
