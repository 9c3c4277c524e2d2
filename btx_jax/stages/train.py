"""Train: one loop for seed, experts, dense continuation and MoE finetune. Writes checkpoints,
metrics and done.json.

The order of a run: 1. look up the directory, 2. check everything that can be known, 3. tokenizer
and data, 4. compile, 5. state (resumed, from a checkpoint, or random), 6. claim the directory, 7.
the loop, 8. done.json.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm.contrib.logging import logging_redirect_tqdm

from btx_jax.checkpoints.checkpoint import Checkpoint, load_base, load_params
from btx_jax.checkpoints.checksums import write_sums
from btx_jax.checkpoints.training_state import (
    Base,
    CheckpointMetadata,
    Checkpoints,
    History,
    TrainingRun,
    read_metadata,
    stored,
)
from btx_jax.config.config import ComputeConfig, Config, TaskConfig
from btx_jax.config.config_dict import flatten, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.costs.chips import peak_flops_per_device
from btx_jax.costs.model import train_flops
from btx_jax.data.mixture import heldout_rows, training_batches
from btx_jax.data.prepare import (
    DEMO,
    check_text,
    prepare_by_all,
    resolve_tokenizer,
    texts,
)
from btx_jax.data.prepared import PreparedDomain, none_heldout
from btx_jax.data.tokenizers import Tokenizer, check_ids, copy_tokenizer
from btx_jax.errors import ConfigError, Mistakes, UserError, suggest
from btx_jax.evaluation.continuation import stop_ids
from btx_jax.evaluation.heldout import make_heldout_step, mean_loss, token_losses
from btx_jax.evaluation.tasks import Candidate, read_test_set, scores, too_long
from btx_jax.models.llama import parameter_counts
from btx_jax.models.lora import join, partition
from btx_jax.parallel.hosts import first_then_others, is_first, put, share_of_rows
from btx_jax.parallel.sharding import batch_sharding, replicated
from btx_jax.presets.recipes import TASKS
from btx_jax.progress import Steps, clock
from btx_jax.reporting import trackers
from btx_jax.reporting.best import Best
from btx_jax.reporting.goodput import Goodput
from btx_jax.reporting.metrics import MetricsWriter, numbers, read_metrics
from btx_jax.reporting.profile import Profile, annotated
from btx_jax.reporting.trackers import Trackers
from btx_jax.rundir import claim, finish, is_resumable, look_up, recorded_config
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import counted, plain
from btx_jax.training.optimizer import is_trained
from btx_jax.training.probe import barrier, is_probed, make_average
from btx_jax.training.start import (
    checked_mesh,
    is_pretrained,
    is_started_as_branch,
    settled,
    start_adapted,
    start_branch,
    starting_model,
    starting_point,
)
from btx_jax.training.step import (
    Metrics,
    TrainState,
    TrainStep,
    decided,
    init_state,
    make_train_step,
    state_shardings,
)
from btx_jax.training.stopping import Cadence, Stopped, stop_signal
from btx_jax.training.storage import shortage, storage
from btx_jax.training.watch import Basin, Dropped, FirstSteps

log = logging.getLogger(__name__)

# params -> {domain: {nats_per_token, bits_per_byte}}. `check` is called before every batch;
# whatever it raises ends the evaluation.
Evaluate = Callable[[Any, Callable[[], None]], dict[str, Any]]
ENDS = 10  # steps, at either end of the run, whose mean training loss is reported


class Preempted(SystemExit):
    """Ctrl-C or SIGTERM was received and the last complete step has been saved. Exit status 130 or
    143, as for any program ended by these signals."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def run(config: Config, workdir: Path) -> None:
    assert config.train and config.data and config.compute and config.mesh and config.checkpoint
    start, goodput = time.monotonic(), Goodput()
    try:
        config = settled(config, recorded_config(workdir))
    except UserError:
        require_right(config)  # reports this and all other mistakes
        raise
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return

    require_right(config)
    assert config.train and config.data and config.compute and config.mesh and config.checkpoint
    init, model = starting_point(config)
    mesh = checked_mesh(config, model)
    kind = mesh.devices.flat[0].device_kind  # shows when a TPU was not found
    told = described(model, config.compute)
    log.info("%s: %s, on %d x %s", workdir.name, told, mesh.size, kind)

    with goodput.doing("data"):
        tokenizer = first_then_others(
            resolve_tokenizer, config.data, init.tokenizer if init else None
        )
    if init is None:
        require_embeddings(tokenizer, model)
    with goodput.doing("data"):
        domains = prepare_by_all(config.data.train, config.data, tokenizer, "config.data.train")
        heldout = domains
        if others := config.data.heldout:
            heldout = prepare_by_all(others, config.data, tokenizer, "config.data.heldout")
    for domain in [*domains, *heldout]:
        check_ids([domain.largest_id()], model.vocab_size, f"domain {domain.name!r}", tokenizer)
    text = {"the tokenizer": tokenizer.sha256} | {
        domain.name: domain.identity() for domain in domains
    }
    batches = training_batches(
        domains,
        config.train.batch_size,
        config.rng_seed,
        *share_of_rows(batch_sharding(mesh)),
    )

    if is_first() and (short := shortage({workdir: storage(config, model)}, workdir)):
        log.warning("%s", short)
    length = config.data.sequence_length
    compute, train = decided(model, config.compute, config.train, mesh, length)
    log.info(
        "compiling the step of %s with accumulate=%d, remat=%s",
        workdir.name,
        train.accumulate,
        compute.remat,
    )
    with goodput.doing("compile"), clock("compiling", is_first()):
        train_step = make_train_step(model, compute, train, mesh, length)

    lines = read_metrics(workdir)
    best = Best(config.checkpoint.best, lines)
    checkpoints = Checkpoints(workdir, config.checkpoint, best)
    with contextlib.ExitStack() as opened:
        opened.callback(checkpoints.close)
        with goodput.doing("restore"):
            state, base = start_state(config, model, mesh, init, checkpoints, batches, text)
            average = None
            if init and is_probed(model, config.train):
                abstract, _ = state_shardings(model, config.train, mesh)
                average = make_average(init, abstract.params, config.train)
        goodput.go_on(workdir, lines, int(state.step))
        claim(workdir, config)
        if is_first():
            copy_tokenizer(tokenizer, workdir / "tokenizer")
            write_sums(workdir / "tokenizer")
            goodput.keep(workdir)
        loop = Loop(
            config,
            workdir,
            model,
            mesh,
            checkpoints,
            init.metadata if init else None,
            text,
            base,
            goodput,
            best,
        )
        rows = train.batch_size // train.accumulate
        evaluate = make_evaluation(model, config, mesh, heldout, tokenizer, rows)
        try_tasks = make_tests(loop.metadata(int(state.step)), config, mesh, tokenizer, rows)
        watching = Trackers(config, workdir, enabled=is_first())
        opened.callback(watching.close)
        state = loop.run(state, batches, train_step, evaluate, average, try_tasks, lines, watching)
        steps = int(state.step)
        results = {"seconds": time.monotonic() - start, "steps": steps, **loop.results()}
        watching.finish(steps, numbers(results))
    finish(workdir, **results)
    for line in loop.reached(steps):
        log.info("%s: %s", workdir.name, line)


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.data
    init: Checkpoint | None = None
    model: ModelConfig | None = None
    is_coming = config.init in coming
    with mistakes.gather():
        if not is_coming:
            init, model = starting_point(config)
        elif (held := coming[config.init] or config.model) is not None:
            model = starting_model(config, held)
    if model is not None:
        with mistakes.gather():
            checked_mesh(config, model)
    with mistakes.gather():
        check_text(config.data, texts(config.data))
    if config.data.tokenizer != DEMO and (init or config.data.tokenizer or not config.init):
        with mistakes.gather():
            tokenizer = resolve_tokenizer(config.data, init.tokenizer if init else None)
            if model is not None and not config.init:
                require_embeddings(tokenizer, model)
    with mistakes.gather():
        for name, task in chosen_tasks(config).items():
            key = f"config.train.eval_tasks.{name}"
            with mistakes.gather():
                read_test_set(task, key)
            if model is not None and too_long(task, model.context):
                mistakes.add(
                    f"{key}.max_tokens={task.max_tokens}: longer than the model's context of"
                    f" {model.context}; leave the test set out"
                )
    trackers.check(config.log, mistakes)
    return model


def chosen_tasks(config: Config) -> dict[str, TaskConfig]:
    """The test sets of config.train.eval_tasks. Raises ConfigError for an unknown name."""
    assert config.train and config.data
    known = {**TASKS, **config.data.tasks}
    for name in config.train.eval_tasks:
        if name not in known:
            raise ConfigError(
                f"config.train.eval_tasks: no test set {name!r}; {suggest(name, known)}"
            )
    limit = config.train.eval_tasks_limit
    return {
        name: dataclasses.replace(known[name], limit=limit or known[name].limit)
        for name in config.train.eval_tasks
    }


def require_embeddings(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise ConfigError when a new model has fewer embeddings than the tokenizer has pieces. For a
    pretrained model that is permitted: the missing pieces may never occur."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={model.vocab_size}: the tokenizer has {tokenizer.vocab_size}"
            " pieces"
        )


def described(model: ModelConfig, compute: ComputeConfig) -> str:
    total, active = parameter_counts(model)
    kind = "a dense model"
    if model.moe:
        shared = " and a shared one" if model.moe.shared_d_ff else ""
        kind = f"a mixture of {counted(max(model.moe.experts), 'expert')}{shared}"
        if model.has_anchor:
            kind += " and their anchor"
        if model.is_branch:
            kind = "a branch with its anchor"
    lora = " with LoRA experts" if model.lora else ""
    used = f" ({active:.3g} active per token)" if active < total else ""
    dispatch = f", {compute.dispatch} dispatch" if model.moe else ""
    return f"{kind}{lora}, {counted(model.layers, 'layer')}, {total:.3g} parameters{used}{dispatch}"


def start_state(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    init: Checkpoint | None,
    checkpoints: Checkpoints,
    batches: Any,
    text: Mapping[str, str],
) -> tuple[TrainState, Base | None]:
    """The initial state, and the base that holds the parameters which checkpoints omit (None if
    they omit none). The state is the run's own latest checkpoint (with its position in the data),
    else the init checkpoint's parameters, else random ones. text: name -> identity of the text.
    Raises UserError when the text has changed since the run's checkpoint was saved."""
    assert config.train
    abstract, _ = state_shardings(model, config.train, mesh)
    latest, key = checkpoints.latest_step(), jax.random.key(config.rng_seed)
    if latest is not None:
        path = checkpoints.path(latest)
        metadata = read_metadata(path)
        params, opt_state, data = checkpoints.restore(
            latest, stored(abstract.params, metadata), abstract.opt_state
        )
        base = metadata.base
        if base:
            shared = partition(abstract.params, metadata.holds)[1]
            under, base = load_base(base, model, shared, path)
            params = join(params, under)
        if changed := [
            name
            for name in sorted({*text, *data["text"]})
            if text.get(name) != data["text"].get(name)
        ]:
            told = (
                f"{', '.join(changed)} changed since step {latest} was saved, which would"
                " change what the run learns"
            )
            raise UserError(f"{path}: {told}; restore it or choose another --workdir")
        batches.set_state(data["batches"])
        log.info("resuming at step %d", latest)
        step = put(np.int32(latest), abstract.step.sharding)
        return TrainState(step, params, opt_state), base
    if init is None:
        return init_state(model, config.train, mesh, key=key), None
    base = None
    if model.lora:
        params, base = start_adapted(init, model, abstract.params, key)
    elif is_started_as_branch(init.metadata, model, config.train):
        params, base = start_branch(init, model, abstract.params)
        base = base if config.train.frozen == "shared" else None
    else:
        params = load_params(init, abstract.params)
    return init_state(model, config.train, mesh, params=params), base


def make_evaluation(
    model: ModelConfig,
    config: Config,
    mesh: Mesh,
    domains: tuple[PreparedDomain, ...],
    tokenizer: Tokenizer,
    at_once: int,
) -> Evaluate | None:
    """The evaluation of held-out loss, `at_once` sequences at a time; None if the config has
    none."""
    assert config.train and config.data and config.compute
    train = config.train
    if not train.eval_every:
        return None
    rows = {domain.name: heldout_rows(domain, train.eval_rows) for domain in domains}
    for domain in domains:
        if not len(rows[domain.name]["tokens"]):
            log.warning("%s; its held-out loss is not measured", none_heldout(domain))
            del rows[domain.name]
    step = make_heldout_step(model, config.compute, mesh)

    def evaluate(params: Any, check: Callable[[], None]) -> dict[str, Any]:
        losses = {
            name: mean_loss(
                token_losses(step, params, values, at_once, mesh, check)[0],
                values,
                tokenizer.eos,
            )
            for name, values in rows.items()
        }
        return {
            name: {"nats_per_token": x.nats_per_token, "bits_per_byte": x.bits_per_byte}
            for name, x in losses.items()
            if x
        }

    return evaluate


def make_tests(
    metadata: CheckpointMetadata,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    at_once: int,
) -> Callable[[Any], dict[str, Any]] | None:
    """A function params -> {test set: metrics}; None if the config has no test sets. metadata: of
    the model being trained. at_once: sequences per batch."""
    compute = config.compute
    assert config.train and compute
    chosen = [
        (name, task, read_test_set(task, f"config.train.eval_tasks.{name}"))
        for name, task in chosen_tasks(config).items()
    ]
    stops = stop_ids(metadata, tokenizer)

    def try_tasks(params: Any) -> dict[str, Any]:
        model = Candidate(metadata.model, params, compute, mesh, tokenizer, stops, at_once)
        return {name: scores(model.try_on(test_set, task, name)) for name, task, test_set in chosen}

    return try_tasks if chosen else None


class Loop:
    """The training loop: steps, metrics one step late, checkpoints, and a clean end on Ctrl-C,
    SIGTERM or a non-finite loss."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: ModelConfig,
        mesh: Mesh,
        checkpoints: Checkpoints,
        init: CheckpointMetadata | None,
        text: Mapping[str, str],
        base: Base | None,
        goodput: Goodput,
        best: Best,
    ):
        assert config.train and config.checkpoint and config.data and config.compute
        self.huggingface = init.huggingface if init else {}
        self.train, self.mesh, self.model = config.train, mesh, model
        self.cadence = Cadence(config.checkpoint)
        self.check: Callable[[], None] = lambda: None  # may raise Stopped
        history: History = init.history if init else {}
        self.workdir, self.checkpoints, self.history, self.text, self.base = (
            workdir,
            checkpoints,
            history,
            text,
            base,
        )
        self.dispatch, self.dropped = config.compute.dispatch, Dropped(config.train.steps)
        self.basin = Basin(init is not None and is_pretrained(init))
        self.goodput, self.best = goodput, best
        self.profile = Profile(config.profile.chosen, workdir)
        self.warnings: list[str] = []
        self.key = jax.jit(
            lambda: jax.random.key(config.rng_seed), out_shardings=replicated(mesh)
        )()
        self.last_saved = checkpoints.latest_step() or 0
        # The identity excludes the settings that a resumed run may change.
        fixed = {
            key: value for key, value in flatten(to_dict(config)).items() if not is_resumable(key)
        }
        runs = sorted(name for name, run in history.items() if run)
        identity = json.dumps([fixed, runs], sort_keys=True)
        self.run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.tokens_per_step = config.train.batch_size * config.data.sequence_length
        trained = functools.partial(is_trained, frozen=config.train.frozen)
        self.flops_per_token = train_flops(model, 1, trained)
        resumed = (
            read_metadata(checkpoints.path(self.last_saved)).history if self.last_saved else {}
        )
        if resumed and self.run_id not in resumed:
            told = f"config.init={config.init!r} is not the checkpoint that this run started from"
            raise UserError(f"{workdir}: {told}; restore it or choose another --workdir")
        before = resumed.get(self.run_id)
        self.seconds = before.seconds if before else 0.0

    def run(
        self,
        state: TrainState,
        batches: Any,
        train_step: TrainStep,
        evaluate: Evaluate | None,
        average: Callable[[Any], Any] | None,
        try_tasks: Callable[[Any], dict[str, Any]] | None,
        lines: Sequence[Mapping[str, Any]],
        trackers: Trackers,
    ) -> TrainState:
        """Run all steps. average: from `make_average`, when mixing is probed. lines: the existing
        contents of metrics.jsonl."""
        train, first = self.train, int(state.step)
        self.peak_bytes = train_step.bytes
        earlier = [line for line in lines if line["step"] <= first]
        self.losses = {line["step"]: line["lm_loss"] for line in earlier if "lm_loss" in line}
        self.heldout = {line["step"]: line["heldout"] for line in earlier if "heldout" in line}
        self.barriers = {line["step"]: line["barrier"] for line in earlier if "barrier" in line}
        self.tried = {line["step"]: line["tasks"] for line in earlier if "tasks" in line}
        self.first_steps = FirstSteps(train.learning_rate, list(self.losses.values()))
        self.evaluate, self.average, self.try_tasks = evaluate, average, try_tasks
        self.writer = MetricsWriter(self.workdir, first, is_first(), trackers)
        # Before the first step, or when the run was killed after saving this one.
        if self.is_evaluated(first) and first not in self.heldout:
            if not first:
                log.info("measuring held-out losses before the first step")
            self.measure(first, state)
        if self.is_tried(first) and first not in self.tried:
            self.measure_tasks(first, state)
        progress = Steps(plain(self.workdir.name), first, train.steps, is_first())
        sharding = batch_sharding(self.mesh)
        self.pending: tuple[int, Metrics] | None = None
        whole, position = first, batches.get_state()
        self.cadence.restart()
        self.clock = time.perf_counter()
        with (
            logging_redirect_tqdm(),
            stop_signal() as stop,
            progress,
            self.goodput.doing("step"),
            self.profile,
        ):
            self.check = stop.check
            try:
                for step in range(first + 1, train.steps + 1):
                    if self.profile.starts(step):
                        self.log_pending(progress, state)
                        with self.aside("other"):
                            self.profile.start(step)
                    local = self.next_batch(batches)
                    batch = {
                        name: jax.make_array_from_process_local_data(
                            sharding, rows, (train.batch_size, rows.shape[1])
                        )
                        for name, rows in local.items()
                    }
                    places = itertools.count()

                    def check(places=places, state=state) -> None:
                        if next(places) == 1:  # the previous step has ended
                            self.log_pending(progress, state)
                        stop.check()

                    with annotated(step):
                        state, metrics = train_step(state, batch, self.key, check)
                    whole, position = step, batches.get_state()
                    before: tuple[int, Metrics] | None = self.pending
                    self.pending = step, metrics
                    if before:  # read while the device computes this step
                        self.log(*before, progress, state)
                    evaluating, trying = self.is_evaluated(step), self.is_tried(step)
                    saving = self.cadence.is_due(step) or step == train.steps
                    profiled = self.profile.ends(step)
                    if evaluating or trying or saving or profiled:
                        self.log_pending(progress, state)
                    if profiled:
                        with self.aside("other"):
                            self.profile.stop()
                    if saving:
                        self.save(step, state, position)
                    if evaluating:
                        self.measure(step, state)
                        self.tell(self.first_steps.compare(step, self.since_start(step)))
                    if trying:
                        self.measure_tasks(step, state)
            except Stopped:
                if self.pending:
                    self.write(*self.pending, progress)
                self.end_early(whole, state, position, stop.number)
        with self.goodput.doing("save"):
            self.checkpoints.wait()
        self.writer.close()
        return state

    @contextlib.contextmanager
    def aside(self, activity: str) -> Iterator[None]:
        """Exclude an activity from the measured step times."""
        with self.goodput.doing(activity):
            yield
        self.clock = time.perf_counter()

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """Read the next batch. The time counts as waiting for data only if the previous step has
        ended by then; otherwise the device was busy throughout."""
        start = time.perf_counter()
        batch = next(batches)
        if self.pending is None or self.pending[1].loss.is_ready():  # type: ignore[attr-defined]
            self.goodput.move("step", "data", time.perf_counter() - start)
        return batch

    def is_evaluated(self, step: int) -> bool:
        if self.evaluate is None:
            return False
        return step % self.train.eval_every == 0 or step == self.train.steps

    def is_tried(self, step: int) -> bool:
        if self.try_tasks is None:
            return False
        every = self.train.eval_tasks_every
        return step in (0, self.train.steps) or bool(every and step % every == 0)

    def end_early(self, whole: int, state: TrainState, position: Any, number: int) -> NoReturn:
        """Save and end after a signal. whole: the last complete step; `state` is the state after
        it."""
        if whole > self.last_saved:
            self.save(whole, state, position)
        self.checkpoints.wait()
        self.writer.close()
        told = f"saved step {whole}" if whole else "no step has finished yet"
        log.warning("%s: %s; run the same command to resume", signal.Signals(number).name, told)
        raise Preempted(number)

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Save a step. position: state of the batch iterator after this step."""
        self.writer.sync()
        with self.aside("save"):
            self.start_save(step, state, position)
        self.cadence.restart()

    def start_save(self, step: int, state: TrainState, position: Any) -> None:
        tokens = step * self.tokens_per_step
        this = TrainingRun(
            tokens,
            tokens * self.flops_per_token,
            self.seconds,
            jax.device_count(),
            self.peak_bytes,
            tuple(self.history),
        )
        self.checkpoints.save(
            self.metadata(step, {self.run_id: this}),
            state.params,
            state.opt_state,
            {"batches": position, "text": self.text},
        )
        self.last_saved = step
        if is_first():
            self.goodput.keep(self.workdir)

    def metadata(self, step: int, run: History | None = None) -> CheckpointMetadata:
        """Metadata of a step's checkpoint. run: this run so far."""
        history = {**self.history, **(run or {})}
        return CheckpointMetadata(self.model, step, history, self.base, self.huggingface)

    def measure(self, step: int, state: TrainState) -> None:
        """Measure held-out losses of these parameters, and of their average with the seed if mixing
        is probed, and record them for this step."""
        assert self.evaluate
        with self.aside("evaluate"):
            self.heldout[step] = self.evaluate(state.params, self.check)
            values = {"heldout": self.heldout[step]} | self.probed(step, state)
        self.write_measured(step, values)
        if "barrier" in values:
            self.barriers[step] = values["barrier"]
            self.tell(self.basin.add(step, values["barrier"]))

    def probed(self, step: int, state: TrainState) -> dict[str, Any]:
        """Losses of the average with the seed, and the mixing barrier if the seed's losses are
        known."""
        if not (self.evaluate and self.average):
            return {}
        branch, seed = self.heldout[step], self.heldout.get(0)
        mixed = branch  # equal to the seed before the first step
        if step:
            mixed = self.evaluate(self.average(state.params), self.check)
        told = {"barrier": barrier(seed, branch, mixed)} if seed else {}
        return {"heldout_mixed": mixed} | told

    def measure_tasks(self, step: int, state: TrainState) -> None:
        """Evaluate these parameters on the test sets and record the results for this step."""
        assert self.try_tasks
        with self.aside("evaluate"):
            self.tried[step] = self.try_tasks(state.params)
        self.write_measured(step, {"tasks": self.tried[step]})

    def write_measured(self, step: int, values: Mapping[str, Any]) -> None:
        self.writer.write(step, values)
        self.best.add(step, values)

    def since_start(self, step: int) -> dict[str, tuple[float, float]]:
        """Domain -> held-out nats per token (at the start, at this step), where both are known."""
        before, now = self.heldout.get(0, {}), self.heldout.get(step, {})
        return {
            name: (before[name]["nats_per_token"], now[name]["nats_per_token"])
            for name in before
            if name in now
        }

    def tell(self, warning: str) -> None:
        """Log a warning now, and once more at the end of the run."""
        if warning:
            self.warnings.append(warning)
            log.warning("%s: %s", self.workdir.name, warning)

    def reached(self, steps: int) -> list[str]:
        """Summary lines about a run that has ended."""
        if domains := self.since_start(steps):
            told = ", ".join(f"{d} {a:.3f} -> {b:.3f}" for d, (a, b) in domains.items())
            rows = f"train.eval_rows={self.train.eval_rows}"
            lines = [f"held-out nats per token ({rows}), start -> end: {told}"]
        elif losses := list(self.losses.values()):
            first, last = (mean(part) for part in (losses[:ENDS], losses[-ENDS:]))
            lines = [f"training loss, first -> last steps: {first:.3f} -> {last:.3f}"]
        else:  # resumed after its last step, with its metrics deleted
            lines = []
        if steps in self.barriers:
            lines.append(f"mixing barrier at the end: {self.barriers[steps]:.3f} nats per token")
        kept = [f"step {steps} is saved in {self.checkpoints.path(steps)}"]
        if (best := self.best(self.checkpoints.steps())) is not None and best != steps:
            told = f"step {best}, the best by {self.best.metric}, is saved in"
            kept.append(f"{told} {self.checkpoints.path(best)}")
        return [*lines, *kept, str(self.goodput), *self.warnings]

    def results(self) -> dict[str, Any]:
        """Results for done.json: goodput, and the best of the kept steps."""
        best = self.best(self.checkpoints.steps())
        told = {} if best is None else {"best": {"step": best, "score": self.best.of(best)}}
        return told | self.goodput.told()

    def log_pending(self, progress: Steps, state: TrainState) -> None:
        before, self.pending = self.pending, None
        if before:
            self.log(*before, progress, state)

    def log(self, step: int, metrics: Metrics, progress: Steps, state: TrainState) -> None:
        """`write` a step's metrics and warn about what they show. state: the current parameters."""
        loss = self.write(step, metrics, progress)

        def heldout() -> dict[str, tuple[float, float]]:
            if not self.evaluate or 0 not in self.heldout:
                return {}
            with self.aside("evaluate"):
                self.heldout[step] = self.evaluate(state.params, self.check)
            return self.since_start(step)

        self.tell(self.first_steps.add(step, loss, heldout))

    def write(self, step: int, metrics: Metrics, progress: Steps) -> float:
        """Write one step's metrics and return its loss. Raises UserError when the loss or the
        gradient is not finite; nothing later is saved."""
        values = jax.device_get(metrics)
        now = time.perf_counter()
        rate = self.tokens_per_step / (now - self.clock)
        self.seconds += now - self.clock
        self.clock = now
        line: dict[str, Any] = {
            name: float(getattr(values, name)) for name in Metrics._fields if name != "routing"
        }
        peak = peak_flops_per_device() * jax.device_count()
        line |= {"tokens_per_second": rate, "mfu": self.flops_per_token * rate / peak}
        if values.routing:
            layers = [
                stats
                for _, stats in sorted(
                    values.routing.items(), key=lambda item: int(item[0].rpartition("_")[2])
                )
            ]
            line["routing"] = {
                name.removesuffix("_E"): [
                    layer for run in layers for layer in getattr(run, name).tolist()
                ]
                for name in layers[0]._fields
                if name != "choice"
            }
        self.writer.write(step, line | self.goodput.told())
        if not all(math.isfinite(line[name]) for name in ("loss", "grad_norm")):
            saved = (
                f"the checkpoint of step {self.last_saved} is intact"
                if self.last_saved
                else "no checkpoint has been saved yet"
            )
            raise UserError(
                f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}: not finite;"
                f" {saved}; lower config.train.learning_rate or inspect the data of this step"
            )
        self.losses[step] = line["lm_loss"]
        shown = {"loss": f"{line['lm_loss']:.3f}", "tok_s": f"{rate:.0f}"}
        if self.barriers:
            shown["barrier"] = f"{self.barriers[max(self.barriers)]:.3f}"
        if self.dispatch == "einsum" and values.routing:
            share = mean(line["routing"]["dropped"])
            shown["dropped"] = f"{share:.1%}"
            self.tell(self.dropped.add(share))
        progress.update(shown)
        return line["lm_loss"]
