"""The schema of every config: frozen dataclasses, checked before anything is compiled.

Every number states its range, every word its choices. An impossible value raises `ConfigError`: the
key, what is wrong, and what to do. config_dict.py turns configs into plain dictionaries and back.
"""

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

ROUTERS = ("normal", "uniform", *SOLVED)
DISPATCHES = ("auto", "einsum", "ragged")
REMAT_POLICIES = ("none", "full", "attention", "ffn")
KERNELS = ("auto", "xla", "pallas", "pallas_interpret")
DTYPES = ("float32", "bfloat16")
FROZEN = ("", "experts", "all_but_routers", "base", "shared", "shared_layers", "anchor")
BESIDE_ANCHOR = ("shared", "shared_layers", "anchor")  # of these, those that leave an anchor alone
ENSEMBLE_WEIGHTS = ("tf_idf", "bayes_uniform", "bayes_updating")
TASKS = ("multiple_choice", "exact_match", "code")
BEST = r"|heldout|heldout/.+/(nats_per_token|bits_per_byte)|tasks/[^/]+/[^/]+"
BOS = ("auto", "always", "never")
STAGES = ("prepare", "train", "mix", "evaluate", "export", "report", "pipeline")

Dtype = Annotated[str, Choice(DTYPES)]
Rows = Annotated[int, Range(1, 2**20)]  # sequences at one time
Tokens = Annotated[int, Range(1, 2**30)]
Axis = Annotated[int, Range(1, 2**20, also=-1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # random keys are made of 32 bits: larger ones repeat


def _no_file_names(key: str, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with names under which something is kept in a directory."""
    for name in names:
        usable = name.isprintable() and "/" not in name and name not in ("", ".", "..")
        if not usable or len(name.encode("utf-8", "surrogatepass")) > 100:
            yield (
                f"{key}: {name[:100]!r} becomes the name of a file: at most 100 bytes, no `/`,"
                " nothing unprintable; choose another"
            )


@dataclass(frozen=True)
class ComputeConfig(Section):
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
    dispatch: einsum (capacity, groups) or ragged (dropless); auto = einsum on TPUs whose mesh has
    an expert axis, else ragged.
    capacity_factor: slots per expert = factor x k x group_size / experts.
    group_size: tokens routed together; dispatch costs 2 x group_size / (3 x d_ff) of the experts'
    FLOPs.
    loss_chunk: tokens whose logits exist at one time in the loss.
    compiler_options: NAME=VALUE, over those that `parallel/compiler_options.py` has for the chip;
        NAME= leaves the compiler's own.
    """

    dtype: Dtype = "bfloat16"
    remat: Annotated[str, Choice(REMAT_POLICIES)] = "full"
    kernels: Annotated[str, Choice(KERNELS)] = "auto"
    unroll: Annotated[int, Range(1, 10_000)] = 1
    dispatch: Annotated[str, Choice(DISPATCHES)] = "auto"
    capacity_factor: Annotated[float, Range(0, 1e3, above=True)] = 1.25
    group_size: Annotated[int, Range(1, 65_536)] = 512
    loss_chunk: Tokens = 1024
    compiler_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainConfig(Section):
    """Optimisation. Defaults are BTX's; what the paper leaves out (betas, clip) is Llama 2's.

    batch_size: sequences per step over all devices. accumulate: micro-batches it is split into, one
    after another.
    learning_rate: its peak; 0 for what suits the model that the run starts from
    (`training.start.default_learning_rate`).
    balance_weight: alpha of the load-balance loss. z_loss_weight: of the router z-loss (ST-MoE), 0
    to leave it out.
    eval_every: steps between held-out losses on eval_rows rows a domain, 0 for none.
    mixing_probe: of a dense branch of `init`, measure each time what mixing would do to it: the
        held-out loss where what mixing shares is the mean of the branch's and the seed's, and the
        barrier (docs/watching.md). Not where nothing shared moves, with LoRA or frozen='shared',
        and not beside an anchor.
    eval_tasks: test sets, of data.tasks or of those that `btx_jax evaluate` knows, tried on the
        model as it is before the first step, every eval_tasks_every steps (0: not in between) and
        after the last. eval_tasks_limit: the first items of each only, 0 for all.
    frozen: what is not trained and has no optimizer state: nothing (""), the experts'
        feed-forwards, all but the routers, the base under LoRA experts, or `shared`: of a dense
        model all but its feed-forwards, so that branches of one checkpoint mix exactly, with
        nothing to average; `shared_layers`: all but those, embeddings and head; or a branch's
        anchor alone. With `base` and `shared` checkpoints hold what is trained alone, and
        name what is under it. frozen_dtype: what is frozen is kept in it, as is mixing_probe's
        seed.
    anchor: the branch trains beside its anchor (FlexOlmo, arXiv 2507.07024): a frozen copy of the
        feed-forwards that it starts from, with a router between the two in every layer. A
        checkpoint that has an anchor keeps it, whatever is said here.
    """

    steps: Count
    batch_size: Rows
    accumulate: Rows = 1
    learning_rate: Annotated[float, Range(0, HUGE)] = 1e-4
    warmup_steps: CountOrZero = 100
    final_lr_fraction: Fraction = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    clip_norm: Positive = 1.0
    balance_weight: Weight = 0.01
    z_loss_weight: Weight = 0.0
    eval_every: CountOrZero = 0
    eval_rows: Rows = 64
    mixing_probe: bool = False
    eval_tasks: tuple[str, ...] = ()
    eval_tasks_every: CountOrZero = 0
    eval_tasks_limit: CountOrZero = 0
    frozen: Annotated[str, Choice(FROZEN)] = ""
    frozen_dtype: Dtype = "float32"
    anchor: bool = False

    @rule
    def _leaves_the_anchor(self) -> Iterator[str]:
        if self.anchor and self.frozen not in BESIDE_ANCHOR:
            yield (
                f"anchor: with frozen={self.frozen!r} branches would not share it, or not train"
                f" beside it; set frozen to {', '.join(map(repr, BESIDE_ANCHOR))}"
            )

    @rule
    def _accumulates(self) -> Iterator[str]:
        if self.batch_size % self.accumulate:
            yield f"accumulate={self.accumulate}: does not divide batch_size={self.batch_size}"

    @rule
    def _warms_up(self) -> Iterator[str]:
        if self.warmup_steps > self.steps:
            yield f"warmup_steps={self.warmup_steps}: more than steps={self.steps}; lower it"


@dataclass(frozen=True)
class FormatConfig(Section):
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
    cutoff: Annotated[int, Range(0, 2**30)] = 0

    @rule
    def _one_kind(self) -> Iterator[str]:
        if bool(self.messages) == bool(self.answer):
            yield "answer: give prompt and answer, or messages, and not both"


@dataclass(frozen=True)
class TaskConfig(Section):
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

    kind: Annotated[str, Choice(TASKS)]
    file: str
    prompt: str
    limit: CountOrZero = 0
    heldout_fraction: Share = 0.0
    shots: Annotated[int, Range(0, 1000)] = 0
    shots_file: str = ""
    max_tokens: Tokens = 256
    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    stop: tuple[str, ...] = ()
    samples: Annotated[int, Range(1, 10_000)] = 1
    pass_at: tuple[Annotated[int, Range(1, 10_000)], ...] = (1,)
    seconds: Annotated[int, Range(1, 86_400)] = 10

    @rule
    def _holds_out_choices(self) -> Iterator[str]:
        if self.heldout_fraction and self.kind != "multiple_choice":
            yield f"heldout_fraction={self.heldout_fraction}: for kind='multiple_choice' only"

    @rule
    def _shots_from_a_file(self) -> Iterator[str]:
        if self.shots and not self.shots_file:
            yield "shots_file: missing, and shots are asked for"

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
    """Text and its tokenizer.

    train, heldout: comma-separated `WHAT[#FIELD][:WEIGHT]`, WHAT a name from domains, a file, a
        glob, `tfds:NAME` or `demo:NAME`. `FILE#@NAME` names one of formats.
    heldout: domains whose held-out documents are measured; "" for those of train.
    domains: name -> sources in the same notation. tasks: name -> test set, for train.eval_tasks.
    tokenizer: a sentencepiece .model, an HF tokenizer.json, a directory with one, or `demo:`; ""
    for the init checkpoint's.
    bos: in front of every document and prompt: what the tokenizer itself puts there (auto), BOS
    always,
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
    bos: Annotated[str, Choice(BOS)] = "auto"
    formats: Mapping[str, FormatConfig] = field(default_factory=dict)
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    sequence_length: Annotated[int, Range(2, 2**24)] = 4096
    heldout_fraction: Share = 0.01
    cache: str = "runs/data"

    @rule
    def _names(self) -> Iterator[str]:
        yield from _no_file_names("domains", self.domains)
        yield from _no_file_names("tasks", self.tasks)


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each mesh axis; -1 on at most one axis means all that remain. The batch is
    split over data, fsdp and expert."""

    data: Axis = 1
    fsdp: Axis = -1
    expert: Axis = 1
    tensor: Axis = 1

    @rule
    def _one_is_open(self) -> Iterator[str]:
        axes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "expert", "tensor")}
        if len(several := [axis for axis, size in axes.items() if size == -1]) > 1:
            yield f"{', '.join(several)}: more than one is -1; name the size of all but one"

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
class CheckpointConfig(Section):
    """every: steps between checkpoints. keep: how many of the newest stay; the last step is always
    saved.

    best: the metric by which one more stays, the best of the steps that were both saved and
        measured; "" for none. The lowest is best of `heldout` (the mean of all domains' nats per
        token), `heldout/DOMAIN/nats_per_token` and `heldout/DOMAIN/bits_per_byte`, the highest of
        `tasks/NAME/METRIC`.
    """

    every: Count = 1000
    keep: Annotated[int, Range(1, 10**6)] = 2
    best: str = "heldout"

    @rule
    def _is_measured(self) -> Iterator[str]:
        if not re.fullmatch(BEST, self.best, re.DOTALL):
            yield (
                f"best={self.best[:100]!r}: must be heldout, heldout/DOMAIN/nats_per_token,"
                " heldout/DOMAIN/bits_per_byte, tasks/NAME/METRIC, or '' for none"
            )


@dataclass(frozen=True)
class LogConfig(Section):
    """Where a run's numbers go besides metrics.jsonl and TensorBoard.

    wandb: a project of Weights & Biases, `[ENTITY/]PROJECT`; WANDB_MODE=offline and the like hold.
    mlflow: an experiment of MLflow, at MLFLOW_TRACKING_URI or else in WORKDIR/mlflow.
    group: what belongs together is found there by it; of a pipeline's stages its directory's name.
    """

    wandb: str = ""
    mlflow: str = ""
    group: str = ""


@dataclass(frozen=True)
class ProfileConfig(Section):
    """steps: `FIRST:END`, the steps FIRST to END - 1 are profiled into WORKDIR/profile; "" for
    none."""

    steps: str = ""

    @rule
    def _is_a_range(self) -> Iterator[str]:
        if self.steps and not _steps(self.steps):
            yield (
                f"steps={self.steps[:100]!r}: must be FIRST:END with 1 <= FIRST < END, such as"
                " 10:13 for the steps 10, 11 and 12"
            )

    @property
    def chosen(self) -> range:
        return _steps(self.steps)


def _steps(notation: str) -> range:
    """FIRST:END; empty where it is none."""
    found = re.fullmatch(r"([1-9]\d{0,8}):(\d{1,10})", notation, re.ASCII)
    return range(int(found[1]), int(found[2])) if found else range(0)


_TEXT_READERS = f"router={SOLVED[0]!r} or {SOLVED[1]!r} and merge={REGMEAN!r}"


@dataclass(frozen=True)
class MixConfig(Section):
    """What becomes one model: the checkpoints, in expert order. One checkpoint with copies > 1 is
    sparse upcycling.

    method: btx = each feed-forward becomes an expert. split = each is cut into `chunks` along d_ff,
    and each chunk becomes an expert. blend = each is cut into as many chunks as there are
    checkpoints, and expert n is the n-th chunk of every one. average = no experts: the mean of all
    parameters, a dense model.
    merge: what becomes of everything else. mean; copy, from `base`; ties, dare, task_arithmetic,
    which measure changes from `base`; slerp, of two; regmean, solved from `text`. density, scale,
    t, alpha: of these, as in recipes, and so is a model that is named twice counted once, but in
    the mean.
    k, routing, first_routing: of every layer of the mixture, as in MoEConfig.
    reinit: of copies, the share of each one's hidden units that are drawn anew, others in each
    (Drop-Upcycling, arXiv 2502.19261: 0.5): the columns of gate and up and the rows of down that
    belong to them, from normal with the mean and standard deviation of what they replace.
    router: how routers start. normal, uniform = random, with standard deviation router_std. ridge =
    solved from text, as `ridge` says; what they are solved from is kept beside the checkpoint, and
    adds and drops experts without any text. logistic = fitted to text.
    text: of each expert's domain, in expert order, in data's notation. Its training documents are
    read, `tokens` of them, and its held-out ones tell how the routers do.
    shared_expert: a checkpoint, such as the seed, whose feed-forwards
    become a shared expert that sees every token, behind a sigmoid gate that starts at one half; the
    routed experts give the other half, so that a mixture of equals is what they are.
    """

    experts: tuple[str, ...]
    copies: Experts = 1
    reinit: Annotated[float, Range(0, 1)] = 0.0
    method: Annotated[str, Choice((*METHODS, AVERAGE))] = "btx"
    chunks: Experts = 1
    k: Experts = 2
    routing: Annotated[str, Choice(ROUTINGS)] = "top_k"
    first_routing: Annotated[str, Choice(ROUTINGS, empty=True)] = ""
    router: Annotated[str, Choice(ROUTERS)] = "normal"
    router_std: Annotated[float, Range(0, 1e3, above=True)] = 0.02
    merge: Annotated[str, Choice((*MERGE_SETTINGS, COPY))] = "mean"
    base: str = ""
    density: Density = 0.2
    scale: Scale = 1.0
    t: Arc = 0.5
    alpha: Alpha = 0.99
    text: tuple[str, ...] = ()
    tokens: TextTokens = 8192
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    shared_expert: str = ""

    @rule
    def _beside_experts(self) -> Iterator[str]:
        if self.shared_expert and self.method == "average":
            yield f"shared_expert={self.shared_expert!r}: method='average' makes no experts"

    @rule
    def _chunks_of_split(self) -> Iterator[str]:
        if (self.chunks > 1) != (self.method == "split"):
            yield f"chunks={self.chunks}: with method='split' at least 2, with the others 1"

    @rule
    def _reinit_of_copies(self) -> Iterator[str]:
        if self.reinit and (self.method != "btx" or self.copies == 1):
            yield (
                f"reinit={self.reinit:g}: draws parts of copies anew, and there are none with"
                f" method={self.method!r} and copies={self.copies}; needs method='btx' and"
                " copies=2 or more"
            )

    @rule
    def _merge_of_a_mixture(self) -> Iterator[str]:
        yield from unread(self, MixConfig)
        if self.merge != "mean" and self.method == AVERAGE:
            yield f"merge={self.merge!r}: of mixtures; method='average' makes a dense model"
        if self.base and self.merge not in (COPY, *READ_BASE):
            yield f"base={self.base!r}: merge={self.merge!r} reads none; leave it out"
        if not self.base and self.merge in (COPY, *READ_BASE):
            yield f"base: missing, and merge={self.merge!r} reads it; name a checkpoint, the seed"
        if self.merge == "slerp" and len(set(self.experts)) != 2:
            yield f"merge='slerp': of 2 models, and experts names {len(set(self.experts))}"

    @rule
    def _text_is_read(self) -> Iterator[str]:
        readers = [f"router={self.router!r}"] * (self.router in SOLVED)
        readers += [f"merge={REGMEAN!r}"] * (self.merge == REGMEAN)
        if self.ridge != RidgeConfig() and self.router != RIDGE:
            yield f"ridge: router={self.router!r} reads none; say {RIDGE!r}, or leave it out"
        if not readers:
            for key, default in (("text", ()), ("tokens", MixConfig.tokens)):
                if getattr(self, key) != default:
                    yield f"{key}: {_TEXT_READERS} read it; leave it out"
            return
        if len(self.text) != len(self.experts):
            yield (
                f"text: {len(self.text)} texts of {len(self.experts)} experts; list one for each,"
                " in their order"
            )
        elif self.router in SOLVED and len(self.experts) > 1 and len(set(self.text)) == 1:
            yield "text: all experts have the same; their router rows would be equal"
        if self.method != "btx" or self.copies > 1:
            yield (
                f"{' and '.join(readers)}: with method={self.method!r} and copies={self.copies}"
                " experts have no domains of their own; needs method='btx' and copies=1"
            )

    @rule
    def _makes_a_mixture(self) -> Iterator[str]:
        if not self.experts:
            yield "experts: none named; list the checkpoints to mix"
            return
        total = len(self.experts) * self.copies * self.chunks
        if total > MAX_EXPERTS:
            yield (
                f"experts: {len(self.experts)} checkpoints, copies={self.copies} and"
                f" chunks={self.chunks} make {total} experts a layer; at most {MAX_EXPERTS}"
            )
            return
        try:
            MoEConfig((total,), self.k, self.routing, self.first_routing)
        except ConfigError as error:
            yield from error.args


@dataclass(frozen=True)
class EnsembleConfig(Section):
    """Branch-Train-Merge: dense models that answer together.

    experts: name among evaluate.models -> the domain of data.domains (or of data.heldout) whose
    training text is its profile.
    weights: tf_idf (the `top` experts by cosine with the document so far), bayes_uniform or
    bayes_updating (posterior given the document so far; `top` is not used).
    """

    experts: Mapping[str, str]
    weights: Annotated[str, Choice(ENSEMBLE_WEIGHTS)] = "tf_idf"
    top: Annotated[int, Range(1, 10_000)] = 2

    @rule
    def _several(self) -> Iterator[str]:
        if len(self.experts) < 2:
            yield "experts: an ensemble needs two or more"
        elif self.top > len(self.experts):
            yield f"top={self.top}: there are {len(self.experts)} experts"


@dataclass(frozen=True)
class OracleConfig(Section):
    """A mixture that is told where its tokens go.

    mixture: name among evaluate.models. experts: every domain of data.heldout -> the number, from
    0, of the expert that all its tokens go to; an anchor's is the last.
    """

    mixture: str
    experts: Mapping[str, CountOrZero]


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """models: name -> checkpoint, each measured on every domain of data.heldout, where there is a
    data section. rows: at most this many a domain, 0 for all.

    seed, experts, mixture: names among models, of what they are to each other: what all others
    started from, what was trained on one domain alone, what a report looks into. With a seed its
    costs are left out of the others'; with experts too, what was gained over it is told.
    tasks: name -> test set, each tried with every model. ensembles: name -> models that answer
    together, by their losses alone. oracles: name -> a mixture that is told where tokens go,
    likewise.
    shown_tokens: of each domain's held-out text, kept with the experts that every mixture chose for
    them; texts: name -> further text to keep so. prompts: each is continued by every model,
    greedily, by prompt_tokens at most. batch_size: sequences at a time over all devices,
    at least; what is measured does not depend on it.
    """

    models: Mapping[str, str]
    seed: str = ""
    experts: tuple[str, ...] = ()
    mixture: str = ""
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    ensembles: Mapping[str, EnsembleConfig] = field(default_factory=dict)
    oracles: Mapping[str, OracleConfig] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    prompt_tokens: Tokens = 64
    shown_tokens: Annotated[int, Range(0, 100_000)] = 160
    rows: CountOrZero = 0
    batch_size: Rows = 8

    @rule
    def _names(self) -> Iterator[str]:
        for key in ("models", "tasks", "ensembles", "oracles"):
            yield from _no_file_names(key, getattr(self, key))
        for name in ("result", "samples"):  # files beside those of the test sets
            if name in self.tasks:
                yield f"tasks.{name}: the name is taken; choose another"

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
                yield f"prompts[{i}]: empty"

    @rule
    def _some_models(self) -> Iterator[str]:
        if not self.models:
            yield "models: none named; map a name to a checkpoint"

    @rule
    def _ensembles_of_models(self) -> Iterator[str]:
        for name, ensemble in self.ensembles.items():
            if name in self.models:
                yield f"ensembles.{name}: a model has that name already"
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
                yield f"oracles.{name}: a model or an ensemble has that name already"
            if oracle.mixture not in self.models:
                yield (
                    f"oracles.{name}.mixture: no model {oracle.mixture!r};"
                    f" {suggest(oracle.mixture, self.models)}"
                )


@dataclass(frozen=True)
class ExportConfig(Section):
    """model: the checkpoint that becomes a Hugging Face directory, WORKDIR/model. dtype: of all its
    tensors; "" keeps each one's own."""

    model: str
    dtype: Annotated[str, Choice(DTYPES, empty=True)] = ""


@dataclass(frozen=True)
class ReportConfig(Section):
    """evaluate: directory of the evaluate stage. runs: name -> directory of every stage whose
    curves and times are shown. others: directories of the evaluate stages of the same arms with
    other seeds; with them, arms are compared in pairs. continual: `MODEL:TASK` in the order of
    training, each model having just learnt its task; the scores on all of them give OP, PD and
    BWT."""

    evaluate: str
    runs: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    continual: tuple[str, ...] = ()

    @rule
    def _names(self) -> Iterator[str]:
        yield from _no_file_names("runs", self.runs)

    @rule
    def _pairs(self) -> Iterator[str]:
        for i, pair in enumerate(self.continual):
            if not all(pair.partition(":")):
                yield f"continual[{i}]={pair!r}: must be MODEL:TASK"
        if len(self.continual) == 1:
            yield "continual: one task alone; name two or more, in the order of training"


@dataclass(frozen=True)
class PipelineStage(Section):
    """One stage of a pipeline. In its config, `@NAME` stands for the working directory of stage
    NAME, which must be in needs."""

    config: "Config"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config(Section):
    """One run. Sections that the stage does not use are left out."""

    stage: Annotated[str, Choice(STAGES)]
    init: str = ""
    rng_seed: Seed = 0
    model: ModelConfig | None = None
    lora: LoRAConfig | None = None
    compute: ComputeConfig | None = None
    train: TrainConfig | None = None
    data: DataConfig | None = None
    mesh: MeshConfig | None = None
    checkpoint: CheckpointConfig | None = None
    mix: MixConfig | None = None
    evaluate: EvaluateConfig | None = None
    export: ExportConfig | None = None
    report: ReportConfig | None = None
    pipeline: Mapping[str, PipelineStage] | None = None
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()

    @rule
    def _has_its_sections(self) -> Iterator[str]:
        for section in _SECTIONS[self.stage]:
            if is_missing(self, section):
                yield f"{section}: missing, and stage {self.stage!r} needs it"

    @rule
    def _profiles_its_steps(self) -> Iterator[str]:
        chosen = self.profile.chosen
        if chosen and self.stage != "train":
            yield f"profile.steps={self.profile.steps!r}: of stage 'train' only"
        elif chosen and self.train and chosen[-1] > self.train.steps:
            yield (
                f"profile.steps={self.profile.steps!r}: train.steps={self.train.steps} is the last"
                " one; END may be one more"
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
    def _has_text_of_routers(self) -> Iterator[str]:
        if self.mix and self.mix.text and is_missing(self, "data"):
            yield "data: missing, and mix.text is read with its domains, cache and lengths"

    @rule
    def _has_something_to_evaluate(self) -> Iterator[str]:
        if self.evaluate is None or not is_missing(self, "data"):
            return
        if self.evaluate.ensembles:
            yield "data: missing, and evaluate.ensembles need held-out text"
        if self.evaluate.oracles:
            yield "data: missing, and evaluate.oracles need held-out text"
        if not self.evaluate.tasks and not self.evaluate.prompts:
            yield "data: missing, and evaluate.tasks is empty: nothing to evaluate on"

    @rule
    def _stages_fit(self) -> Iterator[str]:
        if self.stage != "pipeline" or self.pipeline is None:
            return
        if not self.pipeline:
            yield "pipeline: no stages"
        for name, stage in self.pipeline.items():
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                yield (
                    f"pipeline.{name[:100]}: no name for a stage, whose directory has it; letters,"
                    " digits, _, - and . only"
                )
            if stage.config.stage == "pipeline":
                yield f"pipeline.{name}.config.stage: a pipeline within a pipeline; list its stages"
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
