"""Estimate the cost of a pipeline, stage by stage, before anything is trained."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config import Config, DataConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.model import train_flops
from btx_jax.data.prepare import already_prepared, resolve_tokenizer, shared_text
from btx_jax.data.tokenizers import Tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.models.llama import parameter_counts
from btx_jax.planning.expected import Expected, Spent, curves
from btx_jax.planning.steps import Step, Steps
from btx_jax.progress import bar
from btx_jax.stages.mix import mixed_model
from btx_jax.stages.pipeline import resolved_stages
from btx_jax.training.optimizer import is_trained
from btx_jax.training.probe import is_probed
from btx_jax.training.start import SCRATCH, starting_model
from btx_jax.training.storage import storage

ONE_STAGE = "run"  # name of the stage of a config that is not a pipeline


@dataclass(frozen=True)
class Read:
    """A source of text as read by one stage. there: number of training tokens in the source, None
    if it is not tokenised yet. read: number of tokens that the stage reads from it."""

    domain: str
    where: str
    there: int | None
    read: float

    @property
    def epochs(self) -> float | None:
        return self.read / self.there if self.there else None


@dataclass(frozen=True)
class Stage:
    """Cost of one stage. tokens, steps, flops: of its training; FLOPs as counted by
    `costs.model.train_flops`. memory: bytes on each device, None if nothing was compiled. seconds:
    wall time. stepping: the part of it spent in training steps. storage: an upper bound on the
    bytes left on disk."""

    name: str
    kind: str
    needs: tuple[str, ...]
    tokens: int = 0
    steps: int = 0
    flops: float = 0.0
    memory: float | None = None
    fits: bool = True
    seconds: float = 0.0
    stepping: float = 0.0
    storage: float = 0.0
    reads: tuple[Read, ...] = ()


@dataclass(frozen=True)
class Otherwise:
    """One way to spend the tokens of all branches and the finetune, starting from the seed, whose
    own training is not included. seconds: wall time of the training steps and the mix, if branches
    run in parallel. chip_seconds: the same, if everything runs one after another on one machine.
    expected: change of the seed's held-out loss; None if the study has nothing comparable."""

    name: str
    tokens: int
    flops: float
    seconds: float
    chip_seconds: float
    expected: Expected | None = None


@dataclass(frozen=True)
class Plan:
    """Cost of a whole config. stages: in execution order. chips: number of chips that each stage
    runs on. otherwise: alternatives, including this run. shared: warnings about text that two
    domains have in common."""

    stages: tuple[Stage, ...]
    chips: int
    otherwise: tuple[Otherwise, ...] = ()
    shared: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Total wall time if the stages run one after another."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def critical(self) -> list[Stage]:
        """The chain of stages that takes longest if each stage starts as soon as the stages it
        needs have finished."""
        ends: dict[str, tuple[float, list[Stage]]] = {}
        for stage in self.stages:
            before = max(
                (ends[need] for need in stage.needs), key=lambda e: e[0], default=(0.0, [])
            )
            ends[stage.name] = before[0] + stage.seconds, [*before[1], stage]
        return max(ends.values(), key=lambda end: end[0])[1]


def plan(config: Config, workdir: Path, steps: Steps, chips: int) -> Plan:
    """Plan a config. steps: measures or compiles a training step. chips: number of chips that each
    stage runs on. Raises ConfigError or UserError for a config that cannot run."""
    stages = _resolved(config, workdir)
    models = _models(stages, workdir)
    tokenizers = _tokenizers(stages, workdir)
    known: dict[object, Step] = {}
    trained = [name for name, stage in stages.items() if stage.train and name in models]
    for name in bar(trained, desc="timing steps", unit="run", leave=False):
        key = _program(stages[name], models[name])
        if key not in known:
            known[key] = steps(stages[name], models[name])
    rates = {
        models[name]: known[_program(stages[name], models[name])].heldout_seconds
        / _length(stages[name])
        for name in trained
    }
    needs = {n: stage.needs for n, stage in (config.pipeline or {}).items()}
    compiled: set[object] = set()
    made = []
    for name, stage in stages.items():
        told = Stage(name, stage.stage, needs.get(name, ()))
        if name in trained:
            step, program = known[_program(stage, models[name])], _compiled(stage, models[name])
            told = _trained(told, stage, models[name], step, program in compiled, tokenizers)
            compiled.add(program)
        elif stage.stage == "mix" and name in models:
            told = _mixed(told, stage, models[name], rates)
        elif stage.evaluate:
            told = dataclasses.replace(
                told, seconds=_evaluated(stage, stages, models, workdir, rates)
            )
        elif stage.export and (source := _stage_at(stage.export.model, workdir)) in models:
            told = dataclasses.replace(told, storage=storage(stage, models[source]))
        made.append(told)
    shared = tuple(_shared(stages, tokenizers))
    return Plan(tuple(made), chips, tuple(_otherwise(stages, models, made, workdir)), shared)


def _resolved(config: Config, workdir: Path) -> dict[str, Config]:
    """The stages in execution order, by name. Raises ConfigError for a single stage that trains
    nothing."""
    if config.pipeline is None:
        if config.train is None:
            raise ConfigError(
                f"config.stage={config.stage!r}: trains nothing, so there is"
                " nothing to plan; name a pipeline"
            )
        return {ONE_STAGE: config}
    return resolved_stages(config, workdir)


def _stage_at(path: str, workdir: Path) -> str:
    """Name of the stage that would write a checkpoint at this path, directly in the workdir; "" if
    it is elsewhere."""
    return Path(path).name if path and Path(path).parent == workdir else ""


def _models(stages: Mapping[str, Config], workdir: Path) -> dict[str, ModelConfig]:
    """The model of every stage that trains or mixes. Mixtures of LoRA experts, and stages that
    start from them, are left out."""
    models: dict[str, ModelConfig] = {}

    def held(path: str, key: str) -> ModelConfig | None:
        stage = _stage_at(path, workdir)
        return models.get(stage) if stage in stages else find_checkpoint(path, key).metadata.model

    for name, stage in stages.items():
        key = f"config.pipeline.{name}.config"
        if stage.train:
            before = None if stage.init == SCRATCH else held(stage.init, f"{key}.init")
            if before or stage.init == SCRATCH:
                models[name] = starting_model(stage, before)
        elif stage.mix:
            first = held(stage.mix.experts[0], f"{key}.mix.experts")
            if first and not first.lora:
                models[name] = mixed_model(first, stage.mix)
    return models


def _tokenizers(stages: Mapping[str, Config], workdir: Path) -> dict[str, Tokenizer | None]:
    """The tokenizer of every stage that trains or mixes; None if it is not known yet. A stage that
    names no tokenizer uses the one of the checkpoint it starts from."""
    found: dict[str, Tokenizer | None] = {}
    for name, stage in stages.items():
        start = stage.mix.experts[0] if stage.mix else stage.init
        before = _stage_at(start, workdir)
        if before in found and not (stage.data and stage.data.tokenizer):
            found[name] = found[before]
        elif stage.train or stage.mix:
            try:
                own = None
                if start not in ("", SCRATCH) and before not in stages:
                    own = find_checkpoint(start, "config.init").tokenizer
                found[name] = resolve_tokenizer(stage.data or DataConfig(""), own)
            except UserError:
                found[name] = None
    return found


def _program(stage: Config, model: ModelConfig) -> object:
    """Dictionary key of everything that determines how long a training step takes."""
    assert stage.train
    train = dataclasses.replace(
        stage.train, steps=1, learning_rate=0.0, warmup_steps=0, eval_every=0, mixing_probe=False
    )
    return model, stage.compute, train, _length(stage), stage.mesh


def _compiled(stage: Config, model: ModelConfig) -> object:
    """Dictionary key of everything that determines the compiled step: stages with equal keys share
    one compilation."""
    return model, stage.compute, stage.train, _length(stage), stage.mesh


def _length(stage: Config) -> int:
    assert stage.data
    return stage.data.sequence_length


def _trained(
    told: Stage,
    stage: Config,
    model: ModelConfig,
    step: Step,
    is_compiled: bool,
    tokenizers: Mapping[str, Tokenizer | None],
) -> Stage:
    train, length = stage.train, _length(stage)
    assert train and stage.data

    def trains(path: tuple[str, ...]) -> bool:
        return is_trained(path, train.frozen)

    tokens = train.steps * train.batch_size * length
    flops = train_flops(model, tokens, trains)
    reads = tuple(_reads(stage, tokens, tokenizers.get(told.name)))
    measured = 0.0
    if train.eval_every:
        domains = (stage.data.heldout or stage.data.train).count(",") + 1
        times = 1 + math.ceil(train.steps / train.eval_every)
        passes = 2 * times - 1 if is_probed(model, train) else times
        measured = passes * domains * train.eval_rows * step.heldout_seconds
    compiling = 0.0 if is_compiled else step.compile_seconds
    return dataclasses.replace(
        told,
        tokens=tokens,
        steps=train.steps,
        flops=flops,
        memory=step.memory or None,
        fits=step.fits,
        seconds=train.steps * step.seconds + measured + compiling,
        stepping=train.steps * step.seconds,
        storage=storage(stage, model),
        reads=reads,
    )


def _reads(stage: Config, tokens: int, tokenizer: Tokenizer | None) -> Iterator[Read]:
    assert stage.data
    found = already_prepared(stage.data.train, stage.data, tokenizer, "config.data.train")
    whole = sum(domain.weight for domain, _ in found)
    for domain, manifests in found:
        parts = sum(source.weight for source in domain.sources)
        for source, manifest in zip(domain.sources, manifests, strict=True):
            share = domain.weight / whole * source.weight / parts
            there = manifest["splits"]["train"]["tokens"] if manifest else None
            yield Read(domain.name, source.where, there, tokens * share)


def _shared(
    stages: Mapping[str, Config], tokenizers: Mapping[str, Tokenizer | None]
) -> Iterator[str]:
    """Yield warnings about text that two domains have in common. They are about the text of the
    first stage that reads any, which prepares all of it."""
    data = next((stage.data for stage in stages.values() if stage.data), None)
    if data:
        tokenizer = next(filter(None, tokenizers.values()), None)
        yield from shared_text(already_prepared(data.train, data, tokenizer, "config.data.train"))


def _parameters(model: ModelConfig) -> int:
    return parameter_counts(model)[0]


def _mixed(
    told: Stage, stage: Config, model: ModelConfig, rates: Mapping[ModelConfig, float]
) -> Stage:
    """The stage with its seconds and storage. Solving routers or merges reads each expert's text
    twice: once with the expert and once with the mixture."""
    assert stage.mix
    rate = min(rates.values(), default=0.0)
    tokens = stage.mix.tokens * len(stage.mix.experts) if stage.mix.text else 0
    return dataclasses.replace(told, seconds=2 * tokens * rate, storage=storage(stage, model))


def _evaluated(
    stage: Config,
    stages: Mapping[str, Config],
    models: Mapping[str, ModelConfig],
    workdir: Path,
    rates: Mapping[ModelConfig, float],
) -> float:
    """Seconds spent measuring held-out losses, not including test sets."""
    assert stage.evaluate and stage.data
    domains = (stage.data.heldout or stage.data.train).count(",") + 1
    tokens = stage.evaluate.rows * domains * _length(stage)
    measured = [_stage_at(path, workdir) for path in stage.evaluate.models.values()]
    dense = min(rates.values(), default=0.0)
    found = (models.get(name) for name in measured)
    return tokens * sum(rates.get(model, dense) if model else dense for model in found)


def _otherwise(
    stages: Mapping[str, Config],
    models: Mapping[str, ModelConfig],
    made: list[Stage],
    workdir: Path,
) -> Iterator[Otherwise]:
    """Yield this run and its alternatives (dense training, sparse upcycling) for a pipeline of
    branches, a mix and its finetune; nothing for other pipelines."""
    told = {stage.name: stage for stage in made}
    for name, stage in stages.items():
        if not stage.mix or stage.mix.copies > 1:
            continue
        branches = [_stage_at(path, workdir) for path in stage.mix.experts]
        branches = [branch for branch in branches if branch in told and stages[branch].train]
        branches = [branch for branch in branches if stages[branch].init != SCRATCH]
        tuned = next(
            (n for n, s in stages.items() if s.train and _stage_at(s.init, workdir) == name), ""
        )
        if not branches or tuned not in told:
            continue
        parts = [told[n] for n in (*branches, tuned)]
        tokens, flops = sum(s.tokens for s in parts), sum(s.flops for s in parts)
        apart_seconds = max(told[n].stepping for n in branches)
        dense = dataclasses.replace(models[branches[0]], moe=None)
        seed = _stage_at(stages[branches[0]].init, workdir)
        expected = functools.partial(
            curves().expected,
            parameters=_parameters(dense),
            seed_tokens=told[seed].tokens if seed in told else None,
        )
        cost = train_flops(models[tuned], 1) / train_flops(dense, 1)
        apart = Spent(tokens - told[tuned].tokens, told[tuned].tokens * cost)
        finetune = stages[tuned].train
        yield Otherwise(
            "this run: branches, mix, finetune",
            tokens,
            flops,
            apart_seconds + told[name].seconds + told[tuned].stepping,
            sum(s.stepping for s in parts) + told[name].seconds,
            expected(apart) if finetune and not finetune.frozen else None,
        )
        for other, spent, like, model in (
            ("dense training", Spent(tokens), branches[0], dense),
            ("sparse upcycling", Spent(0, tokens * cost), tuned, models[tuned]),
        ):
            flops = train_flops(model, tokens)
            seconds = flops * told[like].stepping / told[like].flops
            yield Otherwise(other, tokens, flops, seconds, seconds, expected(spent))
        return
