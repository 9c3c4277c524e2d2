"""Pipelines for the user's own seed and domains, from text to a mixture and its report. `btx new`
writes files that call `project`; docs/your-domains.md documents every field."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config import (
    DTYPES,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    Dtype,
    EvaluateConfig,
    ExportConfig,
    MeshConfig,
    MixConfig,
    PipelineStage,
    ReportConfig,
    TrainConfig,
)
from btx_jax.config.config_dict import flatten, to_dict
from btx_jax.config.merges import REGMEAN
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.ridge import RIDGE
from btx_jax.config.schema import Choice, Range, Section, Share, from_dict, rule
from btx_jax.data.tokenizers import named_tokenizer
from btx_jax.errors import ConfigError, suggest
from btx_jax.models.llama import parameter_counts
from btx_jax.presets.experiments import mixed_text
from btx_jax.presets.recipes import MODELS, TASKS
from btx_jax.training.start import default_learning_rate

GENERAL, SEED = "general", "seed"
# Percentage of general text in a branch's text, as in the paper, so that branches forget less.
GENERAL_SHARE = 5
STEPS = 1000  # steps of a run, if that gives steps of a sensible size
ROWS, STEP_TOKENS = 8, 2**22  # least rows and most tokens of a step (the latter is the paper's)
MICRO_TOKENS = 2**16  # most tokens of a micro-batch
# Held-out rows per domain, at each evaluation during a run and at the end of the pipeline: (their
# tokens as a fraction of the training tokens, least rows, most rows).
RUNNING, FINAL = (0.01, 4, 32), (0.1, 16, 128)
# Peak learning rate of runs on all domains, as a fraction of the seed's peak: the best of 1, 0.3
# and 0.1 for the finetune, dense training and upcycling alike (docs/results.md).
LATER_RATE = 0.3
SMALL = 2e7  # activations of models with fewer parameters fit anywhere
COMPARISONS = DENSE, UPCYCLING = "dense", "upcycling"

Tokens = Annotated[int, Range(0, 10**14)]


@dataclass(frozen=True)
class Method:
    """Settings that are specific to a method. branch, finetune: fields of their train sections.
    mix: fields of the mix section. is_exact: whether branches leave unchanged what the mixture
    shares."""

    branch: Mapping[str, Any]
    mix: Mapping[str, Any]
    finetune: Mapping[str, Any]
    is_exact: bool = False

    @property
    def has_anchor(self) -> bool:
        """Whether the mixture contains the seed as the anchor of all branches. Routers then have
        biases, which Hugging Face's classes cannot hold."""
        return bool(self.branch.get("anchor"))


METHODS = {
    "ffn_only": Method({"frozen": "shared"}, {"router": RIDGE}, {}, is_exact=True),
    "btx": Method({"mixing_probe": True}, {"merge": REGMEAN, "router": RIDGE}, {}),
    "flexolmo": Method(
        {"frozen": "shared", "anchor": True, "balance_weight": 0.0, "z_loss_weight": 1e-3},
        {},
        {"frozen": "all_but_routers"},
        is_exact=True,
    ),
}


@dataclass(frozen=True)
class Domain(Section):
    """One domain: its text, and its expert."""

    text: str
    """Files, globs, `hf://datasets/org/name/GLOB` or `gs://...`, comma-separated, each optionally
    with `#FIELD` and `:WEIGHT`."""
    tokens: Tokens = 0
    """Tokens that the domain's branch is trained on; 0 only if `branch` is given."""
    branch: str = ""
    """An existing checkpoint to use as this domain's expert instead of training one; it must have
    been trained from the same seed."""
    share: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    """The domain's weight in the text that the mixture is finetuned on, relative to the other
    domains; general text has 1."""

    @rule
    def _is_trained_or_there(self) -> Iterator[str]:
        if self.tokens and self.branch:
            yield f"tokens={self.tokens}: the domain already has a branch; leave one of them out"
        if not self.tokens and not self.branch:
            yield (
                "tokens: missing; give the number that the branch trains on, or name a"
                " trained branch"
            )


@dataclass(frozen=True)
class Project(Section):
    """The settings that a project's pipeline is made from."""

    seed: str
    """The checkpoint that branches start from: a run's directory, a Hugging Face directory,
    `org/name` on the Hub; or a size, such as `tiny`, to train a seed from scratch."""
    domains: Mapping[str, Domain]
    """The domains, in the order of the experts."""
    finetune_tokens: Annotated[int, Range(1, 10**14)]
    """Tokens that the mixture is finetuned on."""
    general: str = ""
    """Text like the seed's own training text. With it the seed becomes an expert too, and 5 % of
    each branch's text is general, so that branches forget less."""
    seed_tokens: Tokens = 0
    """Tokens, from all text, that a seed from scratch is trained on; 0 for an existing seed."""
    tokenizer: str = ""
    """The tokenizer of a seed from scratch: a `.model`, a `tokenizer.json`, or a directory with
    one."""
    method: Annotated[str, Choice(tuple(METHODS))] = "ffn_only"
    """`ffn_only`: branches train only their feed-forwards, and mix exactly. `btx`: branches train
    everything, and the shared weights are merged in closed form. `flexolmo`: branches train with
    the seed as their anchor, and only the mixture's routers are finetuned."""
    compare: tuple[Annotated[str, Choice(COMPARISONS)], ...] = ()
    """Baselines to train as well, on the same text and number of tokens as branches and finetune
    together."""
    tasks: tuple[Annotated[str, Choice(tuple(TASKS))], ...] = ()
    """Test sets to score in addition to held-out loss; their files are in
    `$BTX_DATA_DIR/evals`."""
    prompts: tuple[str, ...] = ()
    """Prompts that the seed, every expert and the mixture continue, shown side by side in the
    report; the mixture's tokens are coloured by expert."""
    sequence_length: Annotated[int, Range(2, 2**24)] = 512
    """Tokens per row."""
    heldout_fraction: Share = 0.01
    """Share of every domain's documents, above 0, chosen by a hash of their text, that is held out
    for evaluation and never trained on."""
    dtype: Dtype = DTYPES[1]
    """Dtype of activations and matmuls: `bfloat16` suits TPUs and GPUs, `float32` CPUs."""

    @property
    def is_from_scratch(self) -> bool:
        return self.seed in MODELS

    @property
    def texts(self) -> dict[str, str]:
        """Domain -> its text, in the order of the experts."""
        texts = {name: domain.text for name, domain in self.domains.items()}
        return texts | ({GENERAL: self.general} if self.general else {})

    @rule
    def _has_a_seed(self) -> Iterator[str]:
        if not self.seed:
            yield (
                "seed: missing; name a checkpoint (a directory, org/name of the Hub), or a size to"
                f" train from scratch: {', '.join(MODELS)}"
            )
        elif self.seed not in MODELS:
            if "/" not in self.seed and not Path(self.seed).exists():
                yield (
                    f"seed={self.seed!r}: neither an existing directory nor a size to train"
                    f" from scratch; {suggest(self.seed, MODELS)}"
                )
                return
            for key in ("tokenizer", "seed_tokens"):
                if value := getattr(self, key):
                    yield f"{key}={value!r}: the seed is already trained; leave it out"
            return
        if self.seed and not self.tokenizer:
            yield (
                f"tokenizer: missing, but seed={self.seed!r} is trained from scratch; name a"
                " .model or tokenizer.json (`btx tokenizer FILES --out=my.model` trains one)"
            )
        if self.seed and not self.seed_tokens:
            yield (
                f"seed_tokens: missing, but seed={self.seed!r} is trained from scratch; 20 per"
                " parameter are compute-optimal"
            )

    @rule
    def _can_be_measured(self) -> Iterator[str]:
        if not self.heldout_fraction:
            yield "heldout_fraction=0: no text would be left to evaluate on; 0.01 is a good value"

    @rule
    def _has_experts(self) -> Iterator[str]:
        if len(self.domains) + bool(self.general) < 2:
            yield f"domains: {TOO_FEW}"
        for name in self.domains:
            if not is_name(name):
                yield f"domains.{name[:80]}: {NO_NAME}"

    @rule
    def _has_branches_of_its_method(self) -> Iterator[str]:
        for name, domain in self.domains.items():
            if domain.branch and METHODS[self.method].is_exact:
                yield (
                    f"domains.{name}.branch: with method={self.method!r} branches must not"
                    " change shared parameters, but this one was trained elsewhere; use"
                    " method='btx'"
                )


TOO_FEW = "fewer than two and no general text, so there is nothing to mix; add a domain"
NO_NAME = (
    f"not a valid name for a domain; use letters, digits, _ and -, and neither {GENERAL!r} nor"
    f" {SEED!r}"
)


def is_name(word: str) -> bool:
    """Whether a word is a valid name for a domain. Stages and files are named after it."""
    return bool(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", word)) and word not in (GENERAL, SEED)


def project(**fields: Any) -> Config:
    """The pipeline of a project: prepare text, train branches, mix, finetune, evaluate, export to
    Hugging Face, report. fields: those of `Project`, with domains as dictionaries. Raises a
    ConfigError that lists everything wrong with them."""
    made = from_dict(Project, fields, "project")
    scratch = _from_scratch(made) if made.is_from_scratch else None
    held = scratch or find_checkpoint(made.seed, "project.seed").metadata.model
    if made.sequence_length > held.context:
        raise ConfigError(
            f"project.sequence_length={made.sequence_length}: longer than the context of the seed"
            f" {made.seed}; use at most {held.context}"
        )
    return _Stages(made, held).all()


def _from_scratch(project: Project) -> ModelConfig:
    """The model of the size that project.seed names, with one embedding row per token id."""
    found = named_tokenizer(project.tokenizer, "project.tokenizer")
    return dataclasses.replace(MODELS[project.seed], vocab_size=found.vocab_size)


def schedule(tokens: int, length: int, **changes: Any) -> TrainConfig:
    """Training settings for a run on `tokens` tokens in rows of `length`: about STEPS steps, each
    of at least ROWS rows and, as far as those allow, at most the paper's STEP_TOKENS tokens. The
    learning rate is 0: chosen by the model that the run starts from. changes: fields to
    override."""
    rows = 2 ** round(math.log2(max(tokens / STEPS / length, 1)))
    rows = max(min(rows, STEP_TOKENS // length), ROWS)
    steps = max(round(tokens / (rows * length)), 1)
    chosen: dict[str, Any] = {
        "batch_size": rows,
        "accumulate": max(rows * length // MICRO_TOKENS, 1),
        "learning_rate": 0.0,
        "warmup_steps": min(steps // 10, 100),
        "eval_every": max(min(steps // 4, 1000), 1),
        "eval_rows": measured_rows(tokens, length, RUNNING),
    }
    return TrainConfig(steps, **chosen | changes)


def measured_rows(tokens: int, length: int, bounds: tuple[float, int, int]) -> int:
    share, least, most = bounds
    return min(max(round(share * tokens / length), least), most)


@dataclass
class _Stages:
    """Collects the stages of a project. model: the seed's."""

    project: Project
    model: ModelConfig
    stages: dict[str, PipelineStage] = field(default_factory=dict)

    def all(self) -> Config:
        project, method = self.project, METHODS[self.project.method]
        seed = f"@{SEED}" if project.is_from_scratch else project.seed
        start = "" if project.is_from_scratch else seed
        self.add("prepare", Config("prepare", init=start, data=self.data))
        if project.is_from_scratch:
            config = self.training(self.mixed, project.seed_tokens, "scratch")
            self.add(SEED, dataclasses.replace(config, model=self.model))
        experts = {
            name: domain.branch or self.branch(name, seed)
            for name, domain in project.domains.items()
        }
        sources = (*experts.values(), *([seed] if self.has_generalist else []))
        mix: dict[str, Any] = {"k": min(2, len(sources)), **method.mix}
        if method.mix:
            mix["text"] = tuple(project.texts)[: len(sources)]
        self.add(
            "mix",
            Config(
                "mix",
                mix=MixConfig(sources, **mix),
                data=self.data if method.mix else None,
                mesh=MeshConfig(),
            ),
        )
        changes = {"learning_rate": self.later_rate, **method.finetune}
        finetune = self.training(self.mixed, project.finetune_tokens, "@mix", **changes)
        self.add("finetune", finetune)
        models = {
            SEED: seed,
            **{f"expert_{name}": source for name, source in experts.items()},
            **self.comparisons(seed, len(sources)),
            "mixture_untuned": "@mix",
            "mixture": "@finetune",
        }
        self.evaluate(models)
        if not method.has_anchor:
            self.add("export", Config("export", export=ExportConfig("@finetune")))
        runs = {name: f"@{name}" for name in self.stages}
        self.add("report", Config("report", report=ReportConfig("@evaluate", runs)))
        fields = tuple(f"{k}={json.dumps(v)}" for k, v in flatten(to_dict(project)).items())
        return Config("pipeline", pipeline=self.stages, project=fields)

    def add(self, name: str, config: Config) -> str:
        """Add a stage; it needs all stages that its config refers to. Returns its reference
        `@NAME`."""
        needs = [word[1:] for word in _words(config) if word.startswith("@")]
        if config.data and config.stage != "prepare":
            needs.insert(0, "prepare")
        self.stages[name] = PipelineStage(config, tuple(dict.fromkeys(needs)))
        return f"@{name}"

    @property
    def has_generalist(self) -> bool:
        """Whether the seed is one of the routed experts."""
        return bool(self.project.general) and not METHODS[self.project.method].has_anchor

    @property
    def data(self) -> DataConfig:
        project = self.project
        return DataConfig(
            ",".join(project.texts),
            domains=project.texts,
            tokenizer=project.tokenizer,
            sequence_length=project.sequence_length,
            heldout_fraction=project.heldout_fraction,
        )

    @property
    def compute(self) -> ComputeConfig:
        is_small = parameter_counts(self.model)[0] < SMALL
        return ComputeConfig(self.project.dtype, remat="none" if is_small else "auto")

    @property
    def mixed(self) -> str:
        """The text that the finetune, and a seed from scratch, are trained on."""
        shares = {name: domain.share for name, domain in self.project.domains.items()}
        return mixed_text(shares | ({GENERAL: 1.0} if self.project.general else {}))

    def text_of(self, name: str) -> str:
        """The text that a domain's branch is trained on."""
        if not self.project.general:
            return name
        return f"{name}:{100 - GENERAL_SHARE},{GENERAL}:{GENERAL_SHARE}"

    @property
    def later_rate(self) -> float:
        """Peak learning rate of the runs on all domains. 0, which lets the stage choose, if the
        seed's peak is not known."""
        if not self.project.is_from_scratch:
            return 0.0
        seed = schedule(self.project.seed_tokens, self.project.sequence_length)
        return LATER_RATE * default_learning_rate(None, self.model, seed)

    def training(self, text: str, tokens: int, init: str, **changes: Any) -> Config:
        train = schedule(tokens, self.project.sequence_length, **changes)
        return Config(
            "train",
            init=init,
            compute=self.compute,
            train=train,
            data=dataclasses.replace(self.data, train=text, heldout=self.data.train),
            mesh=MeshConfig(),
            checkpoint=CheckpointConfig(every=train.eval_every),
        )

    def branch(self, name: str, seed: str) -> str:
        changes = METHODS[self.project.method].branch
        tokens = self.project.domains[name].tokens
        return self.add(
            f"expert_{name}", self.training(self.text_of(name), tokens, seed, **changes)
        )

    def comparisons(self, seed: str, experts: int) -> dict[str, str]:
        """Add the baselines of project.compare; returns name -> model. Each trains on the text of
        the finetune and of all branches that are trained here."""
        project, made = self.project, {}
        seen = {self.text_of(name): d.tokens for name, d in project.domains.items() if d.tokens}
        seen[self.mixed] = seen.get(self.mixed, 0) + project.finetune_tokens
        text = mixed_text({name: float(tokens) for name, tokens in seen.items()})
        tokens = sum(seen.values())
        if DENSE in project.compare:
            made[DENSE] = self.add(
                DENSE, self.training(text, tokens, seed, learning_rate=self.later_rate)
            )
        if UPCYCLING in project.compare:
            copies = MixConfig((seed,), copies=experts)
            start = self.add("copies", Config("mix", mix=copies, mesh=MeshConfig()))
            made[UPCYCLING] = self.add(
                UPCYCLING, self.training(text, tokens, start, learning_rate=self.later_rate)
            )
        return made

    def evaluate(self, models: dict[str, str]) -> None:
        evaluate = EvaluateConfig(
            models,
            SEED,
            tuple(f"expert_{name}" for name in self.project.domains),
            "mixture",
            tasks={name: TASKS[name] for name in self.project.tasks},
            prompts=self.project.prompts,
            prompt_tokens=min(64, self.model.context // 2),
            rows=measured_rows(self.project.finetune_tokens, self.project.sequence_length, FINAL),
        )
        self.add(
            "evaluate",
            Config(
                "evaluate",
                evaluate=evaluate,
                data=self.data,
                compute=self.compute,
                mesh=MeshConfig(),
            ),
        )


def _words(config: Config) -> Iterator[str]:
    """Yield everything in a stage's config that may refer to another stage."""
    yield config.init
    if config.mix:
        yield from config.mix.experts
    if config.evaluate:
        yield from config.evaluate.models.values()
    if config.export:
        yield config.export.model
    if config.report:
        yield from config.report.runs.values()
