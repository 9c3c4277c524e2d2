"""Train: one loop for seed, experts, dense continuation and MoE finetune. Writes checkpoints,
metrics and done.json.

The order of a run: 1. look the directory up, 2. check all that can be known, 3. tokenizer and data,
4. compile, 5. state (resumed, from a checkpoint, or random), 6. claim the directory, 7. the loop,
8. done.json.
"""

import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm.contrib.logging import logging_redirect_tqdm

from btx_jax import interrupts
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
from btx_jax.config.config import ComputeConfig, Config
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
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.evaluation.heldout import make_heldout_step, mean_loss, token_losses
from btx_jax.models.llama import parameter_counts
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.parallel.hosts import first_then_others, is_first, put
from btx_jax.parallel.sharding import batch_sharding, replicated
from btx_jax.progress import Steps, clock
from btx_jax.reporting.metrics import MetricsWriter, read_metrics
from btx_jax.rundir import claim, finish, is_resumable, look_up, recorded_config
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import plain
from btx_jax.training.start import (
    checked_mesh,
    settled,
    start_adapted,
    starting_model,
    starting_point,
)
from btx_jax.training.step import Metrics, TrainState, init_state, make_train_step, state_shardings
from btx_jax.training.watch import Dropped, FirstSteps

log = logging.getLogger(__name__)

ENDS = 10  # steps whose mean training loss is told, at the start and at the end


class Preempted(SystemExit):
    """Ctrl-C or SIGTERM was received and the step it fell into is saved. Exit status 130 or 143, as
    for any program ended by it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def run(config: Config, workdir: Path) -> None:
    assert config.train and config.data and config.compute and config.mesh and config.checkpoint
    start = time.monotonic()
    try:
        config = settled(config, recorded_config(workdir))
    except UserError:
        require_right(config)  # tells that, and all else that is wrong
        raise
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return

    require_right(config)
    assert config.train and config.data and config.compute and config.mesh and config.checkpoint
    init, model = starting_point(config)
    mesh = checked_mesh(config, model)
    kind = mesh.devices.flat[0].device_kind  # a TPU that was not found shows here
    told = described(model, config.compute)
    log.info("%s: %s, on %d x %s", workdir.name, told, mesh.size, kind)

    tokenizer = first_then_others(resolve_tokenizer, config.data, init.tokenizer if init else None)
    if init is None:
        require_embeddings(tokenizer, model)
    domains = prepare_by_all(config.data.train, config.data, tokenizer, "config.data.train")
    heldout = domains
    if config.data.heldout:
        heldout = prepare_by_all(config.data.heldout, config.data, tokenizer, "config.data.heldout")
    for domain in [*domains, *heldout]:
        check_ids([domain.largest_id()], model.vocab_size, f"domain {domain.name!r}", tokenizer)
    text = {"the tokenizer": tokenizer.sha256} | {
        domain.name: domain.identity() for domain in domains
    }
    batches = training_batches(
        domains, config.train.batch_size, config.rng_seed, jax.process_index(), jax.process_count()
    )

    log.info("compiling the step of %s", workdir.name)
    with clock("compiling", is_first()):
        train_step = make_train_step(
            model, config.compute, config.train, mesh, config.data.sequence_length
        )

    checkpoints = Checkpoints(workdir, config.checkpoint)
    try:
        state, base = start_state(config, model, mesh, init, checkpoints, batches, text)
        claim(workdir, config)
        if is_first():
            copy_tokenizer(tokenizer, workdir / "tokenizer")
            write_sums(workdir / "tokenizer")
        evaluate = make_evaluation(model, config, mesh, heldout, tokenizer)
        loop = Loop(
            config,
            workdir,
            model,
            mesh,
            checkpoints,
            init.metadata if init else None,
            text,
            base,
        )
        state = loop.run(state, batches, train_step, evaluate)
    finally:
        checkpoints.close()
    finish(workdir, seconds=time.monotonic() - start, steps=int(state.step))
    for line in loop.reached(int(state.step)):
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
    return model


def require_embeddings(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Of a model that is made anew. One that comes with a larger vocabulary may never meet it."""
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
        kind = f"a mixture of {max(model.moe.experts)} experts{shared}"
    lora = " with LoRA experts" if model.lora else ""
    used = f" ({active:.3g} for a token)" if active < total else ""
    dispatch = f", {compute.dispatch} dispatch" if model.moe else ""
    return f"{kind}{lora}, {model.layers} layers, {total:.3g} parameters{used}{dispatch}"


def start_state(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    init: Checkpoint | None,
    checkpoints: Checkpoints,
    batches: Any,
    text: Mapping[str, str],
) -> tuple[TrainState, Base | None]:
    """The run's own latest checkpoint (and its place in the data), else the init checkpoint's
    parameters, else random ones; and the base under LoRA experts. text: name -> identity of what is
    read. Raises UserError when the checkpoint's run read something else."""
    assert config.train
    abstract, _ = state_shardings(model, config.train, mesh)
    latest, key = checkpoints.latest_step(), jax.random.key(config.rng_seed)
    if latest is not None:
        params, opt_state, data = checkpoints.restore(
            latest, stored(abstract.params, model), abstract.opt_state
        )
        base = read_metadata(checkpoints.path(latest)).base
        if base:
            under, _ = load_base(
                base, model, partition(abstract.params, is_adapter)[1], checkpoints.path(latest)
            )
            params = join(params, under)
        if changed := [
            name
            for name in sorted({*text, *data["text"]})
            if text.get(name) != data["text"].get(name)
        ]:
            told = (
                f"{', '.join(changed)} changed since step {latest} was saved, and with it what the"
                " run learns"
            )
            raise UserError(
                f"{checkpoints.path(latest)}: {told}; put it back or choose another --workdir"
            )
        batches.set_state(data["batches"])
        log.info("resuming at step %d", latest)
        return TrainState(put(np.int32(latest), abstract.step.sharding), params, opt_state), base
    if init is not None and model.lora:
        params, base = start_adapted(init, model, abstract.params, key)
        return init_state(model, config.train, mesh, params=params), base
    if init is not None:
        return (
            init_state(model, config.train, mesh, params=load_params(init, abstract.params)),
            None,
        )
    return init_state(model, config.train, mesh, key=key), None


def make_evaluation(
    model: ModelConfig,
    config: Config,
    mesh: Mesh,
    domains: tuple[PreparedDomain, ...],
    tokenizer: Tokenizer,
) -> Callable[[Any], dict[str, Any]] | None:
    """params -> {domain: {nats_per_token, bits_per_byte}}, or None when the config asks for
    none."""
    assert config.train and config.data and config.compute
    train = config.train
    if not train.eval_every:
        return None
    rows = {domain.name: heldout_rows(domain, train.eval_rows) for domain in domains}
    for domain in domains:
        if not len(rows[domain.name]["tokens"]):
            log.warning("%s; its held-out loss is left out", none_heldout(domain))
            del rows[domain.name]
    step, micro_batch = (
        make_heldout_step(model, config.compute, mesh),
        train.batch_size // train.accumulate,
    )

    def evaluate(params: Any) -> dict[str, Any]:
        losses = {
            name: mean_loss(
                token_losses(step, params, values, micro_batch, mesh)[0], values, tokenizer.eos
            )
            for name, values in rows.items()
        }
        return {
            name: {"nats_per_token": x.nats_per_token, "bits_per_byte": x.bits_per_byte}
            for name, x in losses.items()
            if x
        }

    return evaluate


class Loop:
    """Steps, metrics one step late, checkpoints, and a clean end on Ctrl-C, SIGTERM or a
    non-finite loss."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: ModelConfig,
        mesh: Mesh,
        checkpoints: Checkpoints,
        init: CheckpointMetadata | None,
        text: Mapping[str, str],
        base: Base | None = None,
    ):
        assert config.train and config.checkpoint and config.data and config.compute
        self.huggingface = init.huggingface if init else {}
        self.train, self.every, self.mesh, self.model = (
            config.train,
            config.checkpoint.every,
            mesh,
            model,
        )
        history: History = init.history if init else {}
        self.workdir, self.checkpoints, self.history, self.text, self.base = (
            workdir,
            checkpoints,
            history,
            text,
            base,
        )
        self.dispatch, self.dropped = config.compute.dispatch, Dropped(config.train.steps)
        self.warnings: list[str] = []
        self.key = jax.jit(
            lambda: jax.random.key(config.rng_seed), out_shardings=replicated(mesh)
        )()
        self.last_saved = checkpoints.latest_step() or 0
        # Without what a resumed run may change: it is the same run.
        fixed = {
            key: value for key, value in flatten(to_dict(config)).items() if not is_resumable(key)
        }
        runs = sorted(name for name, run in history.items() if run)
        identity = json.dumps([fixed, runs], sort_keys=True)
        self.run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.tokens_per_step = config.train.batch_size * config.data.sequence_length
        resumed = (
            read_metadata(checkpoints.path(self.last_saved)).history if self.last_saved else {}
        )
        if resumed and self.run_id not in resumed:
            told = f"config.init={config.init!r} is another checkpoint than when this run began"
            raise UserError(f"{workdir}: {told}; choose another --workdir")
        before = resumed.get(self.run_id)
        self.seconds = before.seconds if before else 0.0

    def run(
        self, state: TrainState, batches: Iterator[Any], train_step: Any, evaluate: Any
    ) -> TrainState:
        train, first = self.train, int(state.step)
        memory = train_step.memory_analysis()
        held = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        )
        self.peak_bytes = int(held - memory.alias_size_in_bytes)
        earlier = read_metrics(self.workdir)
        earlier = [line for line in earlier if line["step"] <= first]
        self.losses = {line["step"]: line["lm_loss"] for line in earlier if "lm_loss" in line}
        self.heldout = {line["step"]: line["heldout"] for line in earlier if "heldout" in line}
        self.first_steps = FirstSteps(train.learning_rate, list(self.losses.values()))
        self.evaluate = evaluate
        self.writer = MetricsWriter(self.workdir, first, enabled=is_first())
        if evaluate and not first and not self.heldout:
            log.info("measuring the held-out losses before the first step")
            self.measure(0, state)
        elif evaluate and first not in self.heldout and self.is_evaluated(first):
            self.measure(first, state)  # the run was killed behind the save of this step
        progress = Steps(plain(self.workdir.name), first, train.steps, is_first())
        sharding = batch_sharding(self.mesh)
        pending: tuple[int, Metrics] | None = None
        self.clock = time.perf_counter()
        with logging_redirect_tqdm(), stop_signal() as stop, progress:
            for step in range(first + 1, train.steps + 1):
                local = next(batches)
                batch = {
                    name: jax.make_array_from_process_local_data(sharding, rows)
                    for name, rows in local.items()
                }
                state, metrics = train_step(state, batch, self.key)
                if pending:  # read while the device works on this step
                    self.log(*pending, progress, state)
                pending = (step, metrics)
                stopping = stop(
                    step
                )  # asked once a step: a signal that comes later falls into the next step
                evaluating = evaluate and self.is_evaluated(step)
                saving = step % self.every == 0 or step == train.steps or stopping
                if evaluating or saving:
                    self.log(*pending, progress, state)
                    pending = None
                if saving:
                    self.writer.sync()
                    self.save(step, state, batches)
                    self.clock = time.perf_counter()
                if evaluating:
                    self.measure(step, state)
                    self.tell(self.first_steps.compare(step, self.since_start(step)))
                if stopping:
                    self.checkpoints.wait()
                    self.writer.close()
                    name = signal.Signals(stopping).name
                    log.warning("%s: saved step %d; run the same command to go on", name, step)
                    raise Preempted(stopping)
        self.checkpoints.wait()
        self.writer.close()
        return state

    def is_evaluated(self, step: int) -> bool:
        return step % self.train.eval_every == 0 or step == self.train.steps

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        tokens = step * self.tokens_per_step
        this = TrainingRun(
            tokens,
            train_flops(self.model, tokens),
            self.seconds,
            jax.device_count(),
            self.peak_bytes,
            tuple(self.history),
        )
        history = {**self.history, self.run_id: this}
        self.checkpoints.save(
            CheckpointMetadata(self.model, step, history, self.base, self.huggingface),
            state.params,
            state.opt_state,
            {"batches": batches.get_state(), "text": self.text},
        )
        self.last_saved = step

    def measure(self, step: int, state: TrainState) -> None:
        """Held-out losses of these parameters, written as those of this step."""
        self.heldout[step] = self.evaluate(state.params)
        self.writer.write(step, {"heldout": self.heldout[step]})
        self.clock = time.perf_counter()

    def since_start(self, step: int) -> dict[str, tuple[float, float]]:
        """Domain -> held-out nats per token at the start and at this step, where both are known."""
        before, now = self.heldout.get(0, {}), self.heldout.get(step, {})
        return {
            name: (before[name]["nats_per_token"], now[name]["nats_per_token"])
            for name in before
            if name in now
        }

    def tell(self, warning: str) -> None:
        """Where it happens, and once more at the end of the run."""
        if warning:
            self.warnings.append(warning)
            log.warning("%s: %s", self.workdir.name, warning)

    def reached(self, steps: int) -> list[str]:
        """What a person wants to know of a run that has ended, a line each."""
        if domains := self.since_start(steps):
            told = ", ".join(f"{d} {a:.3f} -> {b:.3f}" for d, (a, b) in domains.items())
            lines = [f"held-out nats per token, start -> end: {told}"]
        elif losses := list(self.losses.values()):
            first, last = (mean(part) for part in (losses[:ENDS], losses[-ENDS:]))
            lines = [f"training loss, first -> last steps: {first:.3f} -> {last:.3f}"]
        else:  # resumed at its end, its metrics deleted
            lines = []
        return [*lines, f"step {steps} is kept in {self.checkpoints.path(steps)}", *self.warnings]

    def log(self, step: int, metrics: Metrics, progress: Steps, state: TrainState) -> None:
        """Write one step's metrics, and warn of what they show. state: the parameters that there
        are now. Raises UserError when its loss or gradient is not finite: nothing later is
        saved."""
        values = jax.device_get(metrics)
        now = time.perf_counter()
        rate = self.tokens_per_step / (now - self.clock)
        self.seconds += now - self.clock
        self.clock = now
        line: dict[str, Any] = {
            name: float(getattr(values, name)) for name in Metrics._fields if name != "routing"
        }
        peak = peak_flops_per_device() * jax.device_count()
        line |= {"tokens_per_second": rate, "mfu": train_flops(self.model, 1) * rate / peak}
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
        self.writer.write(step, line)
        if not all(math.isfinite(line[name]) for name in ("loss", "grad_norm")):
            saved = (
                f"the checkpoint of step {self.last_saved} is good"
                if self.last_saved
                else "no checkpoint was saved yet"
            )
            raise UserError(
                f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}: not finite;"
                f" {saved}; lower config.train.learning_rate or look at the data of this step"
            )
        self.losses[step] = line["lm_loss"]
        shown = {"loss": f"{line['lm_loss']:.3f}", "tok_s": f"{rate:.0f}"}
        if self.dispatch == "einsum" and values.routing:
            share = mean(line["routing"]["dropped"])
            shown["dropped"] = f"{share:.1%}"
            self.tell(self.dropped.add(share))
        progress.update(shown)

        def heldout() -> dict[str, tuple[float, float]]:
            if not self.evaluate or 0 not in self.heldout:
                return {}
            self.heldout[step] = self.evaluate(state.params)
            self.clock = time.perf_counter()
            return self.since_start(step)

        self.tell(self.first_steps.add(step, line["lm_loss"], heldout))


@contextmanager
def stop_signal() -> Iterator[Callable[[int], int]]:
    """Within it SIGTERM and, in a run of one process, Ctrl-C end nothing at once; the yielded
    function tells, of a step, the signal after which to stop there, or 0. All processes hear the
    same."""
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        return
    with interrupts.noted("saving this step; once more to end at once") as came:
        yield lambda _: came()
