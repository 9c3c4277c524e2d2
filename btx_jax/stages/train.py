"""Train: one loop for seed, experts, dense continuation and MoE finetune. Writes checkpoints,
metrics and done.json.

The order of a run: 1. look the directory up, 2. check all that can be known, 3. tokenizer and data,
4. compile, 5. state (resumed, from a checkpoint, or random), 6. claim the directory, 7. the loop, 8.
done.json.
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
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from btx_jax.checkpoints.checkpoint import Checkpoint, load_base, load_params
from btx_jax.checkpoints.training_state import (
    About,
    Base,
    Checkpoints,
    History,
    TrainingRun,
    read_about,
    stored,
)
from btx_jax.config import Config
from btx_jax.config_dict import flatten, to_dict
from btx_jax.costs.chips import peak_flops_per_device
from btx_jax.costs.model import train_flops
from btx_jax.data.mixture import heldout_rows, training_batches
from btx_jax.data.prepare import (
    DEMO,
    PreparedDomain,
    check_text,
    prepare,
    resolve_tokenizer,
    texts,
)
from btx_jax.data.tokenizers import Tokenizer, check_ids, copy_tokenizer
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.evaluation.heldout import make_heldout_step, mean_loss, token_losses
from btx_jax.model_config import ModelConfig
from btx_jax.models.llama import parameter_counts
from btx_jax.models.lora import is_adapter, join, partition
from btx_jax.parallel.hosts import first_then_others, is_first, put
from btx_jax.parallel.sharding import batch_sharding, replicated
from btx_jax.reporting.metrics import MetricsWriter
from btx_jax.reporting.workdir import claim, finish, is_resumable, look_up
from btx_jax.stages import Coming, require_right
from btx_jax.training.start import checked_mesh, start_adapted, starting_model, starting_point
from btx_jax.training.step import Metrics, TrainState, init_state, make_train_step, state_shardings

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """SIGTERM was received and the step it fell into is saved. Exit status 143, as for any program
    ended by it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def run(config: Config, workdir: Path) -> None:
    assert config.train and config.data and config.compute and config.mesh and config.checkpoint
    start = time.monotonic()
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return

    first_then_others(require_right, config)
    init, model = starting_point(config)
    mesh = checked_mesh(config, model)
    log.info("%s: %s", workdir.name, described(model))

    tokenizer = first_then_others(resolve_tokenizer, config.data, init.tokenizer if init else None)
    if init is None:
        require_embeddings(tokenizer, model)
    domains = first_then_others(
        prepare, config.data.train, config.data, tokenizer, "config.data.train"
    )
    heldout = domains
    if config.data.heldout:
        heldout = first_then_others(
            prepare, config.data.heldout, config.data, tokenizer, "config.data.heldout"
        )
    for domain in [*domains, *heldout]:
        check_ids([domain.largest_id()], model.vocab_size, f"domain {domain.name!r}", tokenizer)
    text = {"the tokenizer": tokenizer.sha256} | {
        domain.name: domain.identity() for domain in domains
    }
    batches = training_batches(
        domains, config.train.batch_size, config.rng_seed, jax.process_index(), jax.process_count()
    )

    log.info("compiling the step of %s", workdir.name)
    train_step = make_train_step(
        model, config.compute, config.train, mesh, config.data.sequence_length
    )

    checkpoints = Checkpoints(workdir, config.checkpoint)
    try:
        state, base = start_state(config, model, mesh, init, checkpoints, batches, text)
        claim(workdir, config)
        if is_first():
            copy_tokenizer(tokenizer, workdir / "tokenizer")
        evaluate = make_evaluation(model, config, mesh, heldout, tokenizer)
        loop = Loop(
            config,
            workdir,
            model,
            mesh,
            checkpoints,
            init.about.history if init else {},
            text,
            base,
            init.about.huggingface if init else {},
        )
        state = loop.run(state, batches, train_step, evaluate)
    finally:
        checkpoints.close()
    finish(workdir, seconds=time.monotonic() - start, steps=int(state.step))


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


def described(model: ModelConfig) -> str:
    total, active = parameter_counts(model)
    kind = (
        f"a mixture of {max(spec.experts for spec in model.layer_specs())} experts"
        if model.moe
        else "a dense model"
    )
    lora = " with LoRA experts" if model.lora else ""
    used = f" ({active:.3g} for a token)" if active < total else ""
    return f"{kind}{lora}, {model.layers} layers, {total:.3g} parameters{used}"


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
        base = read_about(checkpoints.path(latest)).base
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
    for name in [name for name, values in rows.items() if not len(values["tokens"])]:
        log.warning("domain %r has no held-out document: its held-out loss is left out", name)
        del rows[name]
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
    """Steps, metrics one step late, checkpoints, and a clean end on SIGTERM or a non-finite
    loss."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        model: ModelConfig,
        mesh: Mesh,
        checkpoints: Checkpoints,
        history: History,
        text: Mapping[str, str],
        base: Base | None = None,
        huggingface: Mapping[str, Any] | None = None,
    ):
        assert config.train and config.checkpoint and config.data
        self.huggingface = huggingface or {}
        self.train, self.every, self.mesh, self.model = (
            config.train,
            config.checkpoint.every,
            mesh,
            model,
        )
        self.workdir, self.checkpoints, self.history, self.text, self.base = (
            workdir,
            checkpoints,
            history,
            text,
            base,
        )
        self.key = jax.jit(
            lambda: jax.random.key(config.rng_seed), out_shardings=replicated(mesh)
        )()
        self.last_saved = checkpoints.latest_step() or 0
        # Without what a resumed run may change: it is the same run.
        fixed = {
            key: value for key, value in flatten(to_dict(config)).items() if not is_resumable(key)
        }
        identity = json.dumps([fixed, sorted(history)], sort_keys=True)
        self.run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.tokens_per_step = config.train.batch_size * config.data.sequence_length
        resumed = read_about(checkpoints.path(self.last_saved)).history if self.last_saved else {}
        if resumed and self.run_id not in resumed:
            told = f"config.init={config.init!r} is another checkpoint than when this run began"
            raise UserError(f"{workdir}: {told}; choose another --workdir")
        self.seconds = resumed[self.run_id].seconds if resumed else 0.0

    def run(
        self, state: TrainState, batches: Iterator[Any], train_step: Any, evaluate: Any
    ) -> TrainState:
        train, first = self.train, int(state.step)
        memory = train_step.memory_analysis()
        held = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        )
        self.peak_bytes = int(held - memory.alias_size_in_bytes)
        self.writer = MetricsWriter(self.workdir, first, enabled=is_first())
        progress = tqdm(
            total=train.steps,
            initial=first,
            desc=self.workdir.name,
            unit="step",
            disable=not is_first(),
        )
        sharding = batch_sharding(self.mesh)
        pending: tuple[int, Metrics] | None = None
        self.clock = time.perf_counter()
        with sigterm_flag() as stop, progress:
            for step in range(first + 1, train.steps + 1):
                local = next(batches)
                batch = {
                    name: jax.make_array_from_process_local_data(sharding, rows)
                    for name, rows in local.items()
                }
                state, metrics = train_step(state, batch, self.key)
                if pending:  # read while the device works on this step
                    self.log(*pending, progress)
                pending = (step, metrics)
                stopping = stop(
                    step
                )  # asked once a step: a signal that comes later falls into the next step
                evaluating = evaluate and (step % train.eval_every == 0 or step == train.steps)
                saving = step % self.every == 0 or step == train.steps or stopping
                if evaluating or saving:
                    self.log(*pending, progress)
                    pending = None
                if saving:
                    self.writer.sync()
                    self.save(step, state, batches)
                    self.clock = time.perf_counter()
                if evaluating:
                    self.writer.write(step, {"heldout": evaluate(state.params)})
                    self.clock = time.perf_counter()
                if stopping:
                    self.checkpoints.wait()
                    self.writer.close()
                    log.warning("SIGTERM: saved step %d; run the same command to go on", step)
                    raise Preempted
        self.checkpoints.wait()
        self.writer.close()
        return state

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
            About(self.model, step, history, self.base, self.huggingface),
            state.params,
            state.opt_state,
            {"batches": batches.get_state(), "text": self.text},
        )
        self.last_saved = step

    def log(self, step: int, metrics: Metrics, progress: tqdm) -> None:
        """Write one step's metrics. Raises UserError when its loss or gradient is not finite:
        nothing later is saved."""
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
        progress.update(1)
        progress.set_postfix(loss=f"{line['lm_loss']:.3f}", tok_s=f"{rate:.0f}", refresh=False)


@contextmanager
def sigterm_flag() -> Iterator[Callable[[int], bool]]:
    """Within it SIGTERM ends nothing; the yielded function tells, of a step, whether to stop after
    it. All processes hear the same."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    previous = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda _: bool(came)
    finally:
        signal.signal(signal.SIGTERM, previous)
