"""The schema of every config: frozen dataclasses, checked before anything is compiled.

An impossible value raises `ConfigError` with one line: the key, what is wrong, and what to do.
config_dict.py turns configs into plain dictionaries and back.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from btx_jax.errors import ConfigError, one_of, require, suggest
from btx_jax.model_config import LoRAConfig, ModelConfig, MoEConfig

DISPATCHES = ("einsum", "ragged")
REMAT_POLICIES = ("none", "full", "attention", "ffn")
KERNELS = ("auto", "xla", "pallas", "pallas_interpret")
DTYPES = ("float32", "bfloat16")
FROZEN = ("", "experts", "all_but_routers", "base")
MIX_METHODS = ("btx", "average", "split", "blend")
ENSEMBLE_WEIGHTS = ("tf_idf", "bayes_uniform", "bayes_updating")
TASKS = ("multiple_choice", "exact_match", "code")
BOS = ("auto", "always", "never")
STAGES = ("prepare", "train", "mix", "evaluate", "report", "pipeline")


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run. Changes speed and memory; the results only through rounding and, for
    einsum dispatch, dropped tokens.

    dtype: of activations and matmuls; parameters, norms, softmaxes, router and losses are float32
    always.
    remat: what the backward pass finds in memory and need not compute again. full: each layer's
        input. attention: also queries, keys, values, the attention's output and the sum behind it.
        ffn: also the gate and up products. none: everything.
    kernels: auto = pallas on a TPU, else xla. pallas = splash attention (where the sequence is a
        multiple of 128) and megablox for ragged dispatch; pallas_interpret runs those on any
        device, slowly.
    unroll: layers unrolled per step of the scan; 1 compiles fastest, all layers runs up to a
    quarter faster on a CPU.
    dispatch: einsum (capacity, groups) or ragged (dropless).
    capacity_factor: slots per expert = factor x k x group_size / experts.
    group_size: tokens routed together; dispatch costs 2 x group_size / (3 x d_ff) of the experts'
    FLOPs.
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
        one_of("dtype", self.dtype, DTYPES)
        one_of("remat", self.remat, REMAT_POLICIES)
        one_of("kernels", self.kernels, KERNELS)
        one_of("dispatch", self.dispatch, DISPATCHES)
        require(
            self.capacity_factor > 0, f"capacity_factor={self.capacity_factor}: must be positive"
        )
        for key in ("unroll", "group_size", "loss_chunk"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults are BTX's; what the paper leaves out (betas, clip) is Llama 2's.

    batch_size: sequences per step over all devices. accumulate: micro-batches it is split into, one
    after another.
    balance_weight: alpha of the load-balance loss. z_loss_weight: of the router z-loss (ST-MoE), 0
    to leave it out.
    eval_every: steps between held-out losses on eval_rows rows a domain, 0 for none.
    frozen: what is not trained and has no optimizer state: nothing (""), the experts'
        feed-forwards, all but the routers, or the base under LoRA experts. frozen_dtype: what is
        frozen is kept in it.
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
        one_of("frozen", self.frozen, FROZEN)
        one_of("frozen_dtype", self.frozen_dtype, DTYPES)
        for key in ("steps", "batch_size", "accumulate", "eval_rows"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        for key in (
            "warmup_steps",
            "eval_every",
            "weight_decay",
            "balance_weight",
            "z_loss_weight",
        ):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}: must not be negative")
        for key in ("learning_rate", "clip_norm", "eps"):
            require(
                0 < getattr(self, key) < math.inf,
                f"{key}={getattr(self, key)}: must be positive and finite",
            )
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{key}={getattr(self, key)}: must lie in [0, 1)")
        require(
            0 <= self.final_lr_fraction <= 1,
            f"final_lr_fraction={self.final_lr_fraction}: must lie in [0, 1]",
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate={self.accumulate}: does not divide batch_size={self.batch_size}",
        )
        require(
            self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps}: more than steps={self.steps}; lower it",
        )


@dataclass(frozen=True)
class FormatConfig:
    """How an item of JSON lines becomes a document of which the answers alone are learnt.

    prompt, answer: format strings over the item's fields; `{choice}` is choices[gold], where an
    item has both.
    messages: instead, the field of a chat, [{role, content}, ...], which goes through the
        tokenizer's chat template; what assistants say is learnt. cutoff: tokens of a document at
        most, what is behind is cut off; 0 for data.sequence_length.
    """

    prompt: str = ""
    answer: str = ""
    messages: str = ""
    cutoff: int = 0

    def __post_init__(self):
        require(
            bool(self.messages) != bool(self.answer),
            "answer: give prompt and answer, or messages, and not both",
        )
        require(self.cutoff >= 0, f"cutoff={self.cutoff}: must not be negative")


@dataclass(frozen=True)
class DataConfig:
    """Text and its tokenizer.

    train, heldout: comma-separated `WHAT[#FIELD][:WEIGHT]`, WHAT a name from domains, a file, a
        glob, `tfds:NAME` or `demo:NAME`. `FILE#@NAME` names one of formats.
    heldout: domains whose held-out documents are measured; "" for those of train.
    domains: name -> sources in the same notation.
    tokenizer: a sentencepiece .model, an HF tokenizer.json, a directory with one, or `demo:`; ""
    for the init checkpoint's.
    bos: in front of every document and prompt: what the tokenizer itself puts there (auto), BOS always,
        or never. The run's own tokenizer then does so itself.
    heldout_fraction: share of documents, chosen by a hash of their text, that no training run ever
    sees.
    cache: where tokenised data sets are kept, for any run that asks for the same text and
    tokenizer.
    """

    train: str
    heldout: str = ""
    domains: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    bos: str = "auto"
    formats: Mapping[str, FormatConfig] = field(default_factory=dict)
    sequence_length: int = 4096
    heldout_fraction: float = 0.01
    cache: str = "runs/data"

    def __post_init__(self):
        one_of("bos", self.bos, BOS)
        require(
            self.sequence_length >= 2, f"sequence_length={self.sequence_length}: must be at least 2"
        )
        require(
            0 <= self.heldout_fraction < 1,
            f"heldout_fraction={self.heldout_fraction}: must lie in [0, 1)",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one axis means all that remain. The batch is
    split over data, fsdp and expert."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(
                size >= 1 or size == -1,
                f"{axis}={size}: must be at least 1, or -1 for all remaining devices",
            )
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        require(
            len(open_axes) <= 1,
            f"{', '.join(open_axes)}: more than one is -1; name the size of all but one",
        )

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """(data, fsdp, expert, tensor) on this many devices. Raises ConfigError when they do not
        fit."""
        sizes = [self.data, self.fsdp, self.expert, self.tensor]
        fixed = 1
        for size in sizes:
            fixed *= size if size > 0 else 1
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        data, fsdp, expert, tensor = sizes
        if data * fsdp * expert * tensor != devices:
            raise ConfigError(
                f"config.mesh: data={self.data} fsdp={self.fsdp} expert={self.expert}"
                f" tensor={self.tensor} does not fit {devices} device{'s' if devices > 1 else ''};"
                f" the product must be {devices} (-1 takes what remains)"
            )
        return data, fsdp, expert, tensor


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints. keep: how many of the newest stay; the last step is always
    saved."""

    every: int = 1000
    keep: int = 2

    def __post_init__(self):
        for key in ("every", "keep"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True)
class MixConfig:
    """What becomes one model: the checkpoints, in expert order. One checkpoint with copies > 1 is
    sparse upcycling.

    method: btx = each feed-forward becomes an expert. split = each is cut into `chunks` along d_ff,
    and each chunk becomes an expert. blend = each is cut into as many chunks as there are
    checkpoints, and expert n is the n-th chunk of every one. average = no experts: the mean of all
    parameters, a dense model. What is no feed-forward is averaged always.
    k, routing, first_routing: of every layer of the mixture, as in MoEConfig. router_std: of the
    normal router initialisation.
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
        one_of("method", self.method, MIX_METHODS)
        require(self.copies >= 1, f"copies={self.copies}: must be at least 1")
        require(
            self.chunks > 1 if self.method == "split" else self.chunks == 1,
            f"chunks={self.chunks}: with method='split' at least 2, with the others 1",
        )
        require(total >= 1, "experts: none named; list the checkpoints to mix")
        require(
            self.router_std > 0,
            f"router_std={self.router_std}: must be positive, a zero router always picks experts"
            " 0..k-1",
        )
        MoEConfig((total,), self.k, self.routing, self.first_routing)


@dataclass(frozen=True)
class EnsembleConfig:
    """Branch-Train-Merge: dense models that answer together.

    experts: name among evaluate.models -> the domain of data.domains (or of data.heldout) whose
    training text is its profile.
    weights: tf_idf (the `top` experts by cosine with the document so far), bayes_uniform or
    bayes_updating (posterior given the document so far; `top` is not used).
    """

    experts: Mapping[str, str]
    weights: str = "tf_idf"
    top: int = 2

    def __post_init__(self):
        one_of("weights", self.weights, ENSEMBLE_WEIGHTS)
        require(len(self.experts) >= 2, "experts: an ensemble needs two or more")
        require(
            1 <= self.top <= len(self.experts),
            f"top={self.top}: there are {len(self.experts)} experts",
        )


@dataclass(frozen=True)
class TaskConfig:
    """A test set: `file` of JSON lines, `$BTX_DATA_DIR` and the like expanded. limit: its first
    items only, 0 for all.

    kind: multiple_choice (fields choices, gold: the likeliest choice behind the prompt),
    exact_match (field answer: the last number of what is generated, or its text) or code
    (HumanEval's fields: what is generated passes the item's tests).
    heldout_fraction: above 0, of multiple_choice, only the items whose prompt and right choice no
        training run with that data.heldout_fraction has seen.
    prompt: a format string over an item's fields. shots: solved examples in front, from the
    beginning of shots_file.
    max_tokens, temperature, top_p, stop: of generation. samples: programs per item; pass_at: the k
    of pass@k; seconds: CPU time of each.
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
        one_of("kind", self.kind, TASKS)
        for key in ("limit", "shots"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}: must not be negative")
        for key in ("max_tokens", "samples", "seconds"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature}: must not be negative")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must lie in (0, 1]")
        require(
            0 <= self.heldout_fraction < 1,
            f"heldout_fraction={self.heldout_fraction}: must lie in [0, 1)",
        )
        require(
            not self.heldout_fraction or self.kind == "multiple_choice",
            f"heldout_fraction={self.heldout_fraction}: for kind='multiple_choice' only",
        )
        require(
            bool(self.shots_file) or not self.shots, "shots_file: missing, and shots are asked for"
        )
        require(
            all(1 <= k <= self.samples for k in self.pass_at),
            f"pass_at={self.pass_at}: each must lie in 1 .. samples={self.samples}",
        )
        several = self.kind == "code" and self.samples > 1
        require(
            not several or self.temperature > 0,
            "temperature: 0 gives the same program every time; raise it or set samples to 1",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """models: name -> checkpoint, each measured on every domain of data.heldout, where there is a
    data section. rows: at most this many a domain, 0 for all.

    tasks: name -> test set, each tried with every model. ensembles: name -> models that answer
    together, by their losses alone.
    shown_tokens: of each domain's held-out text, kept with the experts that every mixture chose for
    them; texts: name -> further text to keep so. batch_size: sequences at a time over all devices,
    at least; what is measured does not depend on it.
    """

    models: Mapping[str, str]
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    ensembles: Mapping[str, EnsembleConfig] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    shown_tokens: int = 160
    rows: int = 0
    batch_size: int = 8

    def __post_init__(self):
        require(bool(self.models), "models: none named; map a name to a checkpoint")
        require(self.rows >= 0, f"rows={self.rows}: must not be negative")
        require(self.shown_tokens >= 0, f"shown_tokens={self.shown_tokens}: must not be negative")
        require(self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1")
        for name, ensemble in self.ensembles.items():
            require(name not in self.models, f"ensembles.{name}: a model has that name already")
            for expert in ensemble.experts:
                require(
                    expert in self.models,
                    f"ensembles.{name}.experts: no model {expert!r};"
                    f" {suggest(expert, self.models)}",
                )


@dataclass(frozen=True)
class ReportConfig:
    """evaluate: directory of the evaluate stage. runs: name -> directory of every stage whose
    curves and times are shown. others: directories of the evaluate stages of the same arms with
    other seeds; with them, arms are compared in pairs. continual: `MODEL:TASK` in the order of
    training, each model having just learnt its task; the scores on all of them give OP, PD and
    BWT."""

    evaluate: str
    runs: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    continual: tuple[str, ...] = ()

    def __post_init__(self):
        for i, pair in enumerate(self.continual):
            require(all(pair.partition(":")), f"continual[{i}]={pair!r}: must be MODEL:TASK")
        require(
            len(self.continual) != 1,
            "continual: one task alone; name two or more, in the order of training",
        )


@dataclass(frozen=True)
class PipelineStage:
    """One stage of a pipeline. In its config, `@NAME` stands for the working directory of stage
    NAME, which must be in needs."""

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
        one_of("stage", self.stage, STAGES)
        require(self.rng_seed >= 0, f"rng_seed={self.rng_seed}: must not be negative")
        for section in _SECTIONS[self.stage]:
            require(
                getattr(self, section) is not None,
                f"{section}: missing, and stage {self.stage!r} needs it",
            )
        if self.evaluate is not None and self.data is None:
            require(
                not self.evaluate.ensembles,
                "data: missing, and evaluate.ensembles need held-out text",
            )
            require(
                bool(self.evaluate.tasks),
                "data: missing, and evaluate.tasks is empty: nothing to evaluate on",
            )
        if self.stage == "pipeline":
            assert self.pipeline is not None
            for name, stage in self.pipeline.items():
                for need in stage.needs:
                    require(
                        need in self.pipeline,
                        f"pipeline.{name}.needs: no stage {need!r}; {suggest(need, self.pipeline)}",
                    )


_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("data",),
    "train": ("train", "data", "compute", "mesh", "checkpoint"),
    "mix": ("mix", "mesh"),
    "evaluate": ("evaluate", "compute", "mesh"),
    "report": ("report",),
    "pipeline": ("pipeline",),
}
