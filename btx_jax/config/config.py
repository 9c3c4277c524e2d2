"""The schema of every config: frozen dataclasses, validated before anything is compiled.

Every numeric field declares its range, and every option its choices. An invalid value raises
`ConfigError` with the key, what is wrong, and what to do. config_dict.py converts configs to plain
dictionaries and back.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from btx_jax.config.allocation import MAX_EXPERTS
from btx_jax.config.merges import (
    COPY,
    MERGE_SETTINGS,
    READ_BASE,
    REGMEAN,
    Alpha,
    Arc,
    Density,
    Scale,
    TextTokens,
    unread,
)
from btx_jax.config.mix_methods import AVERAGE, METHODS
from btx_jax.config.model_config import ROUTINGS, LoRAConfig, ModelConfig, MoEConfig
from btx_jax.config.ridge import RIDGE, SOLVED, RidgeConfig
from btx_jax.config.schema import (
    HUGE,
    Choice,
    Count,
    CountOrZero,
    Experts,
    Fraction,
    Positive,
    Range,
    Section,
    Share,
    Weight,
    is_missing,
    rule,
)
from btx_jax.errors import ConfigError, suggest
from btx_jax.terminal import counted

ROUTERS = ("normal", "uniform", *SOLVED)
DISPATCHES = ("auto", "einsum", "ragged")
REMAT_POLICIES = ("auto", "none", "full", "attention", "ffn", "offload")
KERNELS = ("auto", "xla", "cuda", "pallas", "pallas_interpret")
QUANTIZATIONS = ("none", "int8")
DTYPES = ("float32", "bfloat16")
FROZEN = ("", "experts", "all_but_routers", "base", "shared", "shared_layers", "anchor")
BESIDE_ANCHOR = ("shared", "shared_layers", "anchor")  # values of frozen that keep the anchor fixed
ENSEMBLE_WEIGHTS = ("tf_idf", "bayes_uniform", "bayes_updating")
TASKS = ("multiple_choice", "exact_match", "code")
BEST = r"|heldout|heldout/.+/(nats_per_token|bits_per_byte)|tasks/[^/]+/[^/]+"
BOS = ("auto", "always", "never")
STAGES = ("prepare", "train", "mix", "evaluate", "export", "report", "pipeline")

Dtype = Annotated[str, Choice(DTYPES)]
Rows = Annotated[int, Range(1, 2**20)]  # sequences at one time
RowsOrZero = Annotated[int, Range(0, 2**20)]
Tokens = Annotated[int, Range(1, 2**30)]
Axis = Annotated[int, Range(1, 2**20, also=-1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # random keys have 32 bits: larger seeds would repeat


def _no_file_names(key: str, names: Iterable[str]) -> Iterator[str]:
    """Yield a message for each name that cannot be used as a file name."""
    for name in names:
        usable = name.isprintable() and "/" not in name and name not in ("", ".", "..")
        if not usable or len(name.encode("utf-8", "surrogatepass")) > 100:
            yield (
                f"{key}: {name[:100]!r} is used as a file name: it must have at most 100 bytes,"
                " all printable, and no `/`; choose another"
            )


@dataclass(frozen=True)
class ComputeConfig(Section):
    """How a model is run. This changes speed and memory; it affects results only through rounding
    and, with einsum dispatch, through dropped tokens."""

    dtype: Dtype = "bfloat16"
    """Dtype of activations and matmuls. Parameters, norms, softmaxes, routers and losses are always
    float32."""
    remat: Annotated[str, Choice(REMAT_POLICIES)] = "auto"
    """What is kept in memory for the backward pass rather than recomputed. auto: on TPUs and GPUs
    ffn, attention or full, by an estimate of their memory; full elsewhere. full: only each layer's
    input. attention: also queries, keys, values, the attention's output and the sum after it. ffn:
    also the gate and up products. offload: the same as attention, with everything but keys and
    values in host memory (on GPUs the attention's output is computed again). none: everything (no
    rematerialisation)."""
    kernels: Annotated[str, Choice(KERNELS)] = "auto"
    """auto: pallas on a TPU, cuda on an NVIDIA GPU since Ampere (from jax 0.11.2 on), xla
    elsewhere. pallas: splash attention (for sequence lengths that are multiples of 128) and
    megablox for ragged dispatch. pallas_interpret: the same on any device, slowly. cuda: in
    bfloat16, cuDNN's flash attention (without a cap on scores, for heads of at most 128 elements, a
    multiple of 8), and on Hopper GPUs Mosaic's grouped matmuls for ragged dispatch (from 128 rows,
    widths that are multiples of 128); xla for the rest."""
    quantize: Annotated[str, Choice(QUANTIZATIONS)] = "none"
    """int8: round the operands of the large matmuls in training to int8, except for weight
    gradients (SwitchBack, models/int8.py). TPUs multiply int8 up to twice as fast. Not with ragged
    dispatch."""
    unroll: Annotated[int, Range(1, 10_000)] = 1
    """Layers per step of the scan. 1 compiles fastest; unrolling all layers runs up to a quarter
    faster on a CPU."""
    dispatch: Annotated[str, Choice(DISPATCHES)] = "auto"
    """einsum: with a capacity and groups. ragged: dropless. auto: einsum on TPUs whose mesh has an
    expert axis, ragged elsewhere."""
    capacity_factor: Annotated[float, Range(0, 1e3, above=True)] = 1.25
    """With einsum dispatch: slots per expert and group = factor x k x group_size / experts. Tokens
    beyond them are dropped."""
    group_size: Annotated[int, Range(1, 65_536)] = 512
    """Tokens that einsum dispatch routes together, which costs 2 x group_size / (3 x d_ff) of the
    experts' FLOPs."""
    loss_chunk: Tokens = 1024
    """Tokens whose logits exist at the same time in the loss."""
    compiler_options: tuple[str, ...] = ()
    """Compiler options NAME=VALUE, in addition to those in `parallel/compiler_options.py` for the
    chip; NAME= restores the compiler's default."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """Optimisation with AdamW. Defaults are BTX's; where the paper does not state them (betas,
    clipping), Llama 2's."""

    steps: Count
    """Optimizer steps."""
    batch_size: Rows
    """Sequences per step, over all devices."""
    accumulate: RowsOrZero = 1
    """Number of micro-batches into which a step's batch is split; they are computed one after
    another. 0: as few as are estimated to fit a TPU's or GPU's memory; on CPUs one row per
    device."""
    learning_rate: Annotated[float, Range(0, HUGE)] = 1e-4
    """Peak learning rate. 0 chooses one that suits the model from which the run starts
    (`training.start.default_learning_rate`)."""
    warmup_steps: CountOrZero = 100
    """Warm-up steps, over which the learning rate rises linearly from 0 to its peak."""
    final_lr_fraction: Fraction = 0.1
    """The learning rate at the end of the cosine decay, as a fraction of the peak."""
    beta1: Share = 0.9
    """AdamW's decay of the first moment."""
    beta2: Share = 0.95
    """AdamW's decay of the second moment."""
    first_moment_dtype: Dtype = "float32"
    """Dtype in which AdamW keeps the first moment; bfloat16 saves two bytes per parameter."""
    eps: Positive = 1e-8
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    """AdamW's decoupled weight decay."""
    clip_norm: Positive = 1.0
    """Maximum global norm of the gradients; larger gradients are scaled down to it."""
    balance_weight: Weight = 0.01
    """Weight (alpha) of the load-balancing loss of mixtures."""
    z_loss_weight: Weight = 0.0
    """Weight of the router z-loss (ST-MoE) of mixtures; 0 disables it."""
    eval_every: CountOrZero = 0
    """Steps between evaluations of the held-out loss; 0 for none."""
    eval_rows: Rows = 64
    """Sequences per domain in the held-out loss."""
    mixing_probe: bool = False
    """For a dense branch of `init`, also measure the effect of mixing it: the held-out loss with
    the parameters that mixing shares averaged between the branch and its seed, and the mixing
    barrier (docs/watching.md). Not available where no shared parameter is trained (LoRA,
    frozen='shared'), nor with an anchor."""
    eval_tasks: tuple[str, ...] = ()
    """Test sets, from data.tasks or those known to `btx evaluate`, that are scored before the first
    step, every eval_tasks_every steps and after the last."""
    eval_tasks_every: CountOrZero = 0
    """Steps between evaluations of eval_tasks; 0 for none in between."""
    eval_tasks_limit: CountOrZero = 0
    """Items of each test set to score, from its beginning; 0 for all."""
    frozen: Annotated[str, Choice(FROZEN)] = ""
    """The parameters that are not trained and have no optimizer state. Empty: none. experts: the
    experts' feed-forwards. all_but_routers. base: the model under LoRA experts. shared: everything
    but the feed-forwards of a dense model, so that branches of one checkpoint mix exactly, with
    nothing to average. shared_layers: everything but feed-forwards, embeddings and head. anchor:
    only the anchor. With base and shared, checkpoints hold only what is trained, and name their
    base."""
    frozen_dtype: Dtype = "float32"
    """Dtype of frozen parameters, and of the mixing probe's copy of the seed."""
    anchor: bool = False
    """Train the branch with an anchor (FlexOlmo, arXiv 2507.07024): a frozen copy of its initial
    feed-forwards, with a router between the two in every layer. A checkpoint that has an anchor
    keeps it regardless of this setting."""

    @rule
    def _leaves_the_anchor(self) -> Iterator[str]:
        if self.anchor and self.frozen not in BESIDE_ANCHOR:
            yield (
                f"anchor: with frozen={self.frozen!r} branches would not share the anchor, or"
                " could not train next to it; set frozen to"
                f" {', '.join(map(repr, BESIDE_ANCHOR))}"
            )

    @rule
    def _accumulates(self) -> Iterator[str]:
        if self.accumulate and self.batch_size % self.accumulate:
            yield (
                f"accumulate={self.accumulate}: does not divide"
                f" batch_size={self.batch_size}; use a divisor"
            )

    @rule
    def _warms_up(self) -> Iterator[str]:
        if self.warmup_steps > self.steps:
            yield f"warmup_steps={self.warmup_steps}: more than steps={self.steps}; lower it"


@dataclass(frozen=True)
class FormatConfig(Section):
    """How an item of instruction data becomes a document in which only the answers are learnt."""

    prompt: str = ""
    """Format string over the item's fields; its tokens are read, with their loss masked. `{choice}`
    is choices[gold], for an item that has both."""
    answer: str = ""
    """Format string over the item's fields; its tokens are learnt. Required unless `messages` is
    given."""
    messages: str = ""
    """Instead of both: the field that holds a chat, [{role, content}, ...], which is rendered by
    the tokenizer's chat template; the assistant's turns are learnt."""
    cutoff: Annotated[int, Range(0, 2**30)] = 0
    """Maximum tokens of a document; the rest is truncated. 0 for data.sequence_length."""

    @rule
    def _one_kind(self) -> Iterator[str]:
        if bool(self.messages) == bool(self.answer):
            yield "answer: give either prompt and answer, or messages"


@dataclass(frozen=True)
class TaskConfig(Section):
    """A test set."""

    kind: Annotated[str, Choice(TASKS)]
    """multiple_choice: fields `choices` and `gold`; the answer is the most likely choice after the
    prompt. exact_match: field `answer`; compared with the last number of the generated text, or
    with the text. code: HumanEval's fields; the generated program must pass the item's tests."""
    file: str
    """JSON lines, one item each; `$BTX_DATA_DIR` and other variables are expanded."""
    prompt: str
    """Format string over an item's fields."""
    limit: CountOrZero = 0
    """Number of items to use, from the first; 0 for all."""
    heldout_fraction: Share = 0.0
    """If above 0, for multiple_choice: use only the items whose prompt with the right choice is
    held out from every training run with this data.heldout_fraction."""
    shots: Annotated[int, Range(0, 1000)] = 0
    """Number of solved examples before each prompt, from the beginning of shots_file."""
    shots_file: str = ""
    """JSON lines of the same kind; required for shots."""
    max_tokens: Tokens = 256
    """Maximum number of tokens to generate for an item."""
    temperature: Annotated[float, Range(0, 100)] = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling: keep the most likely tokens up to this probability."""
    stop: tuple[str, ...] = ()
    """Strings that end a generated text."""
    samples: Annotated[int, Range(1, 10_000)] = 1
    """With code: programs to generate per item."""
    pass_at: tuple[Annotated[int, Range(1, 10_000)], ...] = (1,)
    """With code: the k of pass@k, each at most `samples`."""
    seconds: Annotated[int, Range(1, 86_400)] = 10
    """With code: CPU seconds that each program may use."""

    @rule
    def _holds_out_choices(self) -> Iterator[str]:
        if self.heldout_fraction and self.kind != "multiple_choice":
            yield (
                f"heldout_fraction={self.heldout_fraction}: only used with"
                " kind='multiple_choice'; set it to 0"
            )

    @rule
    def _shots_from_a_file(self) -> Iterator[str]:
        if self.shots and not self.shots_file:
            yield f"shots_file: missing, but shots={self.shots} needs it"

    @rule
    def _stops_at_text(self) -> Iterator[str]:
        if "" in self.stop:
            yield "stop: an empty string would end every text at once; leave it out"

    @rule
    def _passes_at(self) -> Iterator[str]:
        if max(self.pass_at, default=1) > self.samples:
            yield f"pass_at={self.pass_at}: each must lie in 1 .. samples={self.samples}"

    @rule
    def _samples_differ(self) -> Iterator[str]:
        if self.kind == "code" and self.samples > 1 and not self.temperature:
            yield "temperature: 0 gives the same program every time; raise it or set samples to 1"


@dataclass(frozen=True)
class DataConfig(Section):
    """Text and its tokenizer."""

    train: str
    """Training text: comma-separated `WHAT[#FIELD][:WEIGHT]`, where WHAT is a name from domains, a
    file, a glob, `hf://datasets/...`, `tfds:NAME` or `demo:NAME`. `FILE#@NAME` uses one of
    formats."""
    heldout: str = ""
    """Domains whose held-out documents are evaluated, in the same notation; empty for those of
    train."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain name -> sources in the same notation."""
    tokenizer: str = ""
    """A sentencepiece .model, a tokenizer.json, a directory that contains one, a name on the Hub,
    or `demo:`; empty for that of the init checkpoint."""
    bos: Annotated[str, Choice(BOS)] = "auto"
    """What precedes every document and prompt. auto: whatever the tokenizer itself adds. always,
    never: BOS, or nothing; the tokenizer stored with the run then does the same."""
    formats: Mapping[str, FormatConfig] = field(default_factory=dict)
    """Format name -> how instruction data becomes documents."""
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    """Test set name -> test set, for train.eval_tasks."""
    sequence_length: Annotated[int, Range(2, 2**24)] = 4096
    """Tokens per packed row."""
    heldout_fraction: Share = 0.01
    """Share of documents, chosen by a hash of their text, that are held out from every training
    run."""
    cache: str = "runs/data"
    """Cache directory of tokenised data sets, shared by all runs with the same text and
    tokenizer."""

    @rule
    def _names(self) -> Iterator[str]:
        yield from _no_file_names("domains", self.domains)
        yield from _no_file_names("tasks", self.tasks)


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each mesh axis; -1 on at most one axis takes all that remain. The batch is
    sharded over data, fsdp and expert."""

    data: Axis = 1
    """Replicas of the weights, each with its part of the batch; the only axis that crosses
    slices."""
    fsdp: Axis = -1
    """Devices over which weights and optimizer state are sharded."""
    expert: Axis = 1
    """Devices over which experts are distributed; all other parameters are sharded over it as over
    fsdp."""
    tensor: Axis = 1
    """Devices over which heads and hidden units are sharded."""
    context: Axis = 1
    """Devices that share the tokens of one row, for training on long sequences; weights and
    optimizer state are sharded over it as over fsdp."""

    @rule
    def _one_is_open(self) -> Iterator[str]:
        names = ("data", "fsdp", "expert", "tensor", "context")
        axes = {axis: getattr(self, axis) for axis in names}
        if len(several := [axis for axis, size in axes.items() if size == -1]) > 1:
            yield f"{', '.join(several)}: at most one may be -1; give the size of the others"

    def shape(self, devices: int) -> tuple[int, int, int, int, int]:
        """(data, fsdp, expert, tensor, context) for this number of devices. Raises ConfigError when
        they do not fit."""
        sizes = [self.data, self.fsdp, self.expert, self.tensor, self.context]
        fixed = math.prod(size for size in sizes if size > 0)
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        data, fsdp, expert, tensor, context = sizes
        if math.prod(sizes) != devices:
            raise ConfigError(
                f"config.mesh: data={self.data} fsdp={self.fsdp} expert={self.expert}"
                f" tensor={self.tensor} context={self.context} does not fit"
                f" {counted(devices, 'device')}; the product must be {devices} (-1 stands for"
                " the rest)"
            )
        return data, fsdp, expert, tensor, context


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Which steps are saved. The last step always is."""

    every: Count = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, Range(1, 10**6)] = 2
    """Number of newest checkpoints to keep."""
    best: str = "heldout"
    """The metric that selects one more checkpoint to keep, the best step that was both saved and
    evaluated; empty for none. Lowest is best for `heldout` (the mean of all domains' nats per
    token), `heldout/DOMAIN/nats_per_token` and `heldout/DOMAIN/bits_per_byte`; highest for
    `tasks/NAME/METRIC`."""
    every_minutes: Annotated[float, Range(0, 10**6)] = 0.0
    """Maximum minutes between checkpoints, and thus the most work that a killed run loses; 0 for
    `every` alone."""

    @rule
    def _is_measured(self) -> Iterator[str]:
        if not re.fullmatch(BEST, self.best, re.DOTALL):
            yield (
                f"best={self.best[:100]!r}: must be heldout, heldout/DOMAIN/nats_per_token,"
                " heldout/DOMAIN/bits_per_byte, tasks/NAME/METRIC, or '' for none"
            )


@dataclass(frozen=True)
class LogConfig(Section):
    """Trackers that receive a run's numbers in addition to metrics.jsonl and TensorBoard."""

    wandb: str = ""
    """A project of Weights & Biases, `[ENTITY/]PROJECT`; WANDB_MODE=offline and its other variables
    apply."""
    mlflow: str = ""
    """An MLflow experiment, at MLFLOW_TRACKING_URI or else in WORKDIR/mlflow."""
    group: str = ""
    """Name under which the tracker groups runs; for a pipeline's stages, by default the name of its
    directory."""


@dataclass(frozen=True)
class ProfileConfig(Section):
    """Which steps are profiled, into WORKDIR/profile."""

    steps: str = ""
    """`FIRST:END`: profile steps FIRST to END - 1; empty for none."""

    @rule
    def _is_a_range(self) -> Iterator[str]:
        if self.steps and not _steps(self.steps):
            yield (
                f"steps={self.steps[:100]!r}: must be FIRST:END with 1 <= FIRST < END, such as"
                " 10:13 for steps 10, 11 and 12"
            )

    @property
    def chosen(self) -> range:
        return _steps(self.steps)


def _steps(notation: str) -> range:
    """Parse FIRST:END as a range of steps; empty if the notation is invalid."""
    found = re.fullmatch(r"([1-9]\d{0,8}):(\d{1,10})", notation, re.ASCII)
    return range(int(found[1]), int(found[2])) if found else range(0)


_TEXT_READERS = f"router={SOLVED[0]!r} or {SOLVED[1]!r} and merge={REGMEAN!r}"


@dataclass(frozen=True)
class MixConfig(Section):
    """How checkpoints become one model."""

    experts: tuple[str, ...]
    """Checkpoints, in the order of the experts."""
    copies: Experts = 1
    """Number of experts made from each checkpoint; several copies of one checkpoint are sparse
    upcycling."""
    reinit: Annotated[float, Range(0, 1)] = 0.0
    """With copies: the share of hidden units to reinitialise, drawn separately for each copy
    (Drop-Upcycling, arXiv 2502.19261, uses 0.5): columns of gate and up and the matching rows of
    down, drawn from a normal distribution with the mean and standard deviation of the values they
    replace."""
    method: Annotated[str, Choice((*METHODS, AVERAGE))] = "btx"
    """btx: each feed-forward becomes an expert. split: each is split into `chunks` along d_ff, and
    each chunk becomes an expert. blend: each is split into as many chunks as there are checkpoints,
    and expert n consists of the n-th chunk of every one. average: no experts; the mean of all
    parameters, a dense model."""
    chunks: Experts = 1
    """With split: number of experts per feed-forward."""
    k: Experts = 2
    """Experts per token, in every layer."""
    routing: Annotated[str, Choice(ROUTINGS)] = "top_k"
    """Routing of every layer of the mixture, as in model.moe."""
    first_routing: Annotated[str, Choice(ROUTINGS, empty=True)] = ""
    """Different routing for the first layer, as in model.moe; empty for the same."""
    router: Annotated[str, Choice(ROUTERS)] = "normal"
    """How routers are initialised. normal, uniform: random, with standard deviation router_std.
    ridge: solved in closed form from text; the sums are stored with the checkpoint, so that experts
    can be added and dropped without text. logistic: fitted to text."""
    router_std: Annotated[float, Range(0, 1e3, above=True)] = 0.02
    """Standard deviation of random router rows."""
    merge: Annotated[str, Choice((*MERGE_SETTINGS, COPY))] = "mean"
    """How everything but the feed-forwards is merged. mean: averaged. copy: taken from `base`.
    ties, dare, task_arithmetic: merge the changes relative to `base`. slerp: between two models.
    regmean: solved from `text`. Except with mean, a model that is named twice counts once."""
    base: str = ""
    """The checkpoint that copy, ties, dare and task_arithmetic read."""
    density: Density = 0.2
    """With ties and dare: the share of changes to keep."""
    scale: Scale = 1.0
    """With task_arithmetic: the factor on the sum of changes."""
    t: Arc = 0.5
    """With slerp: the position along the arc, from 0 (the first model) to 1 (the second)."""
    alpha: Alpha = 0.99
    """With regmean: the factor on the off-diagonal entries of the inputs' second moments."""
    text: tuple[str, ...] = ()
    """With ridge, logistic and regmean: the text of each expert's domain, in the order of the
    experts and in data's notation. Training documents are read; held-out ones evaluate the
    routers."""
    tokens: TextTokens = 8192
    """Tokens to read from each text."""
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    """Settings of router=ridge."""
    shared_expert: str = ""
    """A checkpoint, such as the seed, whose feed-forwards become a shared expert that every token
    passes through, with a sigmoid gate that starts at one half. The routed experts contribute the
    other half, so that mixing equal models reproduces the model. Empty for none."""

    @rule
    def _beside_experts(self) -> Iterator[str]:
        if self.shared_expert and self.method == "average":
            yield (
                f"shared_expert={self.shared_expert!r}: not used by method='average', which"
                " makes no experts; leave it out"
            )

    @rule
    def _chunks_of_split(self) -> Iterator[str]:
        if (self.chunks > 1) != (self.method == "split"):
            yield (
                f"chunks={self.chunks}: must be at least 2 with method='split' and 1 with"
                " other methods"
            )

    @rule
    def _reinit_of_copies(self) -> Iterator[str]:
        if self.reinit and (self.method != "btx" or self.copies == 1):
            yield (
                f"reinit={self.reinit:g}: reinitialises parts of copies, but"
                f" method={self.method!r} with copies={self.copies} makes none; set"
                " method='btx' and copies=2 or more"
            )

    @rule
    def _merge_of_a_mixture(self) -> Iterator[str]:
        yield from unread(self, MixConfig)
        if self.merge != "mean" and self.method == AVERAGE:
            yield (
                f"merge={self.merge!r}: only used for mixtures, but method='average' makes"
                " a dense model; leave it out"
            )
        if self.base and self.merge not in (COPY, *READ_BASE):
            yield f"base={self.base!r}: not used by merge={self.merge!r}; leave it out"
        if not self.base and self.merge in (COPY, *READ_BASE):
            yield (
                f"base: missing, but merge={self.merge!r} needs it; name a checkpoint, such"
                " as the seed"
            )
        if self.merge == "slerp" and len(set(self.experts)) != 2:
            yield (
                "merge='slerp': merges exactly 2 models, but experts names"
                f" {len(set(self.experts))}; use another merge"
            )

    @rule
    def _text_is_read(self) -> Iterator[str]:
        readers = [f"router={self.router!r}"] * (self.router in SOLVED)
        readers += [f"merge={REGMEAN!r}"] * (self.merge == REGMEAN)
        if self.ridge != RidgeConfig() and self.router != RIDGE:
            yield (
                f"ridge: not used by router={self.router!r}; set router={RIDGE!r}, or leave it out"
            )
        if not readers:
            for key, default in (("text", ()), ("tokens", MixConfig.tokens)):
                if getattr(self, key) != default:
                    yield f"{key}: only used with {_TEXT_READERS}; leave it out"
            return
        if len(self.text) != len(self.experts):
            yield (
                f"text: {len(self.text)} texts for {len(self.experts)} experts; list one per"
                " expert, in the same order"
            )
        elif self.router in SOLVED and len(self.experts) > 1 and len(set(self.text)) == 1:
            yield (
                "text: all experts have the same text, so their router rows would be"
                " equal; give each its own"
            )
        if self.method != "btx" or self.copies > 1:
            yield (
                f"{' and '.join(readers)}: with method={self.method!r} and copies={self.copies}"
                " experts have no domains of their own; set method='btx' and copies=1"
            )

    @rule
    def _makes_a_mixture(self) -> Iterator[str]:
        if not self.experts:
            yield "experts: empty; list the checkpoints to mix"
            return
        total = len(self.experts) * self.copies * self.chunks
        if total > MAX_EXPERTS:
            yield (
                f"experts: {len(self.experts)} checkpoints, copies={self.copies} and"
                f" chunks={self.chunks} make {total} experts per layer; use at most"
                f" {MAX_EXPERTS}"
            )
            return
        try:
            MoEConfig((total,), self.k, self.routing, self.first_routing)
        except ConfigError as error:
            yield from error.args


@dataclass(frozen=True)
class EnsembleConfig(Section):
    """Branch-Train-Merge: an ensemble of dense models."""

    experts: Mapping[str, str]
    """Name in evaluate.models -> the domain of data.domains (or of data.heldout) whose training
    text is its profile."""
    weights: Annotated[str, Choice(ENSEMBLE_WEIGHTS)] = "tf_idf"
    """tf_idf: the `top` experts by cosine similarity with the document so far. bayes_uniform,
    bayes_updating: the posterior given the document so far, with a prior that is uniform or updated
    by earlier documents."""
    top: Annotated[int, Range(1, 10_000)] = 2
    """With tf_idf: number of experts in use at a time."""

    @rule
    def _several(self) -> Iterator[str]:
        if len(self.experts) < 2:
            yield "experts: an ensemble needs two or more; name another"
        elif self.top > len(self.experts):
            yield f"top={self.top}: more than the {len(self.experts)} experts; lower it"


@dataclass(frozen=True)
class OracleConfig(Section):
    """A mixture whose tokens are routed by their domain."""

    mixture: str
    """Name of the mixture in evaluate.models."""
    experts: Mapping[str, CountOrZero]
    """Every domain of data.heldout -> the index, from 0, of the expert that receives all of its
    tokens; an anchor is the last."""


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Which models are evaluated, and on what."""

    models: Mapping[str, str]
    """Name -> checkpoint; each is evaluated on every domain of data.heldout, if there is a data
    section."""
    seed: str = ""
    """Name in models of the model from which all others started. Its cost is excluded from theirs,
    and gains are relative to it."""
    experts: tuple[str, ...] = ()
    """Names in models of those trained on a single domain; with a seed, the gain of each is
    reported."""
    mixture: str = ""
    """Name in models of the mixture that a report examines."""
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    """Name -> test set, scored with every model."""
    ensembles: Mapping[str, EnsembleConfig] = field(default_factory=dict)
    """Name -> ensemble of models; only its losses are evaluated."""
    oracles: Mapping[str, OracleConfig] = field(default_factory=dict)
    """Name -> mixture whose tokens are routed by domain; only its losses are evaluated."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Name -> further text for which the chosen experts are recorded."""
    prompts: tuple[str, ...] = ()
    """Prompts that every model continues greedily; the report shows them side by side."""
    prompt_tokens: Tokens = 64
    """Maximum new tokens of each continuation."""
    shown_tokens: Annotated[int, Range(0, 100_000)] = 160
    """Tokens of each domain's held-out text for which the experts chosen by every mixture are
    recorded."""
    rows: CountOrZero = 0
    """Maximum sequences per domain; 0 for all."""
    batch_size: Rows = 8
    """Minimum number of sequences in a batch over all devices; results do not depend on it."""

    @rule
    def _names(self) -> Iterator[str]:
        for key in ("models", "tasks", "ensembles", "oracles"):
            yield from _no_file_names(key, getattr(self, key))
        for name in ("result", "samples"):  # files stored with those of the test sets
            if name in self.tasks:
                yield f"tasks.{name}: the name is reserved; choose another"

    @rule
    def _roles(self) -> Iterator[str]:
        roles = {"seed": (self.seed,), "experts": self.experts, "mixture": (self.mixture,)}
        for key, names in roles.items():
            for name in filter(None, names):
                if name not in self.models:
                    yield f"{key}: no model {name!r}; {suggest(name, self.models)}"

    @rule
    def _has_words_to_continue(self) -> Iterator[str]:
        for i, prompt in enumerate(self.prompts):
            if not prompt:
                yield f"prompts[{i}]: empty; give some text or leave it out"

    @rule
    def _some_models(self) -> Iterator[str]:
        if not self.models:
            yield "models: empty; map at least one name to a checkpoint"

    @rule
    def _ensembles_of_models(self) -> Iterator[str]:
        for name, ensemble in self.ensembles.items():
            if name in self.models:
                yield f"ensembles.{name}: a model already has that name; choose another"
            for expert in ensemble.experts:
                if expert not in self.models:
                    yield (
                        f"ensembles.{name}.experts: no model {expert!r};"
                        f" {suggest(expert, self.models)}"
                    )

    @rule
    def _oracles_of_models(self) -> Iterator[str]:
        for name, oracle in self.oracles.items():
            if name in self.models or name in self.ensembles:
                yield (
                    f"oracles.{name}: a model or an ensemble already has that name; choose another"
                )
            if oracle.mixture not in self.models:
                yield (
                    f"oracles.{name}.mixture: no model {oracle.mixture!r};"
                    f" {suggest(oracle.mixture, self.models)}"
                )


@dataclass(frozen=True)
class ExportConfig(Section):
    """What is exported as a Hugging Face directory."""

    model: str
    """The checkpoint to export to WORKDIR/model."""
    dtype: Annotated[str, Choice(DTYPES, empty=True)] = ""
    """Dtype of all tensors; empty to keep each tensor's own."""


@dataclass(frozen=True)
class ReportConfig(Section):
    """What a report shows."""

    evaluate: str
    """Directory of the evaluate stage."""
    runs: Mapping[str, str] = field(default_factory=dict)
    """Name -> directory, for every stage whose curves and times are shown."""
    others: tuple[str, ...] = ()
    """Directories of evaluate stages of the same arms with other seeds; arms are then compared in
    pairs."""
    continual: tuple[str, ...] = ()
    """`MODEL:TASK` in the order of training, where each model has just learnt its task. Overall
    performance, performance drop and backward transfer are computed from the scores on all
    tasks."""

    @rule
    def _names(self) -> Iterator[str]:
        yield from _no_file_names("runs", self.runs)

    @rule
    def _pairs(self) -> Iterator[str]:
        for i, pair in enumerate(self.continual):
            if not all(pair.partition(":")):
                yield f"continual[{i}]={pair!r}: must be MODEL:TASK"
        if len(self.continual) == 1:
            yield "continual: only one task; list two or more, in the order of training"


@dataclass(frozen=True)
class PipelineStage(Section):
    """One stage of a pipeline."""

    config: "Config"
    """The stage's config, in which `@NAME` stands for the working directory of stage NAME, which
    must be listed in needs."""
    needs: tuple[str, ...] = ()
    """Stages that must finish first."""


@dataclass(frozen=True)
class Config(Section):
    """One run. Sections that its stage does not use are omitted."""

    stage: Annotated[str, Choice(STAGES)]
    """What the run does."""
    init: str = ""
    """The checkpoint from which training starts, or `scratch` for random weights."""
    rng_seed: Seed = 0
    """Random seed of weights, data order, routers and dropout."""
    model: ModelConfig | None = None
    """The model to train from scratch; with a checkpoint in init it may be omitted, and must
    otherwise equal the checkpoint's."""
    lora: LoRAConfig | None = None
    """LoRA experts to train on top of init."""
    compute: ComputeConfig | None = None
    """How the model is run."""
    train: TrainConfig | None = None
    """Optimisation, for stage train."""
    data: DataConfig | None = None
    """Text and tokenizer."""
    mesh: MeshConfig | None = None
    """Devices along each mesh axis."""
    checkpoint: CheckpointConfig | None = None
    """Which steps are saved, for stage train."""
    mix: MixConfig | None = None
    """How checkpoints become one model, for stage mix."""
    evaluate: EvaluateConfig | None = None
    """Which models are evaluated, and on what, for stage evaluate."""
    export: ExportConfig | None = None
    """What is exported as a Hugging Face directory, for stage export."""
    report: ReportConfig | None = None
    """What a report shows, for stage report."""
    pipeline: Mapping[str, PipelineStage] | None = None
    """Name -> stage, for stage pipeline."""
    project: tuple[str, ...] = ()
    """The fields of the `project(...)` that the pipeline was made from, as `FIELD=JSON`. They are
    recorded so that a changed field can be reported by name."""
    log: LogConfig = LogConfig()
    """Trackers in addition to metrics.jsonl and TensorBoard."""
    profile: ProfileConfig = ProfileConfig()
    """Which steps are profiled."""

    @rule
    def _has_its_sections(self) -> Iterator[str]:
        for section in _SECTIONS[self.stage]:
            if is_missing(self, section):
                yield f"{section}: missing, but stage {self.stage!r} needs it"

    @rule
    def _profiles_its_steps(self) -> Iterator[str]:
        chosen = self.profile.chosen
        if chosen and self.stage != "train":
            yield f"profile.steps={self.profile.steps!r}: only used by stage 'train'; leave it out"
        elif chosen and self.train and chosen[-1] > self.train.steps:
            yield (
                f"profile.steps={self.profile.steps!r}: the last step is"
                f" train.steps={self.train.steps}; END may be at most one more"
            )

    @rule
    def _has_a_best(self) -> Iterator[str]:
        if not (self.checkpoint and self.train and self.checkpoint.best.startswith("tasks/")):
            return
        _, name, _ = self.checkpoint.best.split("/")
        if name not in self.train.eval_tasks:
            known = suggest(name, self.train.eval_tasks) if self.train.eval_tasks else "none"
            yield f"checkpoint.best: no {name!r} in train.eval_tasks; {known}"

    @rule
    def _cuts_rows_of_training(self) -> Iterator[str]:
        if self.mesh is None or self.mesh.context == 1:
            return
        told = f"mesh.context={self.mesh.context}"
        if self.stage != "train":
            yield f"{told}: only used by stage 'train'; leave it out"
        if self.train and self.train.eval_tasks:
            yield (
                f"{told}: test sets are not split over devices; leave out mesh.context or"
                " train.eval_tasks"
            )

    @rule
    def _has_text_of_routers(self) -> Iterator[str]:
        if self.mix and self.mix.text and is_missing(self, "data"):
            yield "data: missing, but mix.text needs its domains, cache and lengths"

    @rule
    def _has_something_to_evaluate(self) -> Iterator[str]:
        if self.evaluate is None or not is_missing(self, "data"):
            return
        if self.evaluate.ensembles:
            yield "data: missing, but evaluate.ensembles need held-out text"
        if self.evaluate.oracles:
            yield "data: missing, but evaluate.oracles need held-out text"
        if not self.evaluate.tasks and not self.evaluate.prompts:
            yield (
                "data: missing, but evaluate.tasks is empty, so there is nothing to"
                " evaluate on; give one of them"
            )

    @rule
    def _stages_fit(self) -> Iterator[str]:
        if self.stage != "pipeline" or self.pipeline is None:
            return
        if not self.pipeline:
            yield "pipeline: empty; list its stages"
        for name, stage in self.pipeline.items():
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                yield (
                    f"pipeline.{name[:100]}: not a valid stage name, as it names a directory;"
                    " use only letters, digits, _, - and ."
                )
            if stage.config.stage == "pipeline":
                yield (
                    f"pipeline.{name}.config.stage: pipelines cannot be nested; list its"
                    " stages here"
                )
            for need in stage.needs:
                if need not in self.pipeline:
                    yield (
                        f"pipeline.{name}.needs: no stage {need!r}; {suggest(need, self.pipeline)}"
                    )


_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("data",),
    "train": ("train", "data", "compute", "mesh", "checkpoint"),
    "mix": ("mix", "mesh"),
    "evaluate": ("evaluate", "compute", "mesh"),
    "export": ("export",),
    "report": ("report",),
    "pipeline": ("pipeline",),
}
