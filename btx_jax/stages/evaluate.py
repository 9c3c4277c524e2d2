"""Evaluate: held-out loss of every model on every domain, and where an MoE sends each domain's tokens. Writes results.json."""

import logging
import time
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from tqdm import tqdm

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.config import Config, ConfigError
from btx_jax.data.mixture import heldout_batches
from btx_jax.data.prepare import prepare, resolve_tokenizer
from btx_jax.data.tokenizers import load_tokenizer, tokenizer_sha256
from btx_jax.evaluation.heldout import heldout_loss, make_heldout_step
from btx_jax.models.llama import abstract_params, parameter_counts
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.parallel.sharding import make_mesh, param_shardings
from btx_jax.reporting.workdir import claim, finish, write_json

log = logging.getLogger(__name__)

RESULTS = "results.json"


def run(config: Config, workdir: Path) -> None:
    assert config.evaluate and config.data and config.compute and config.mesh
    start = time.monotonic()
    if claim(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return
    found = {name: find_checkpoint(path, f"config.evaluate.models.{name}") for name, path in config.evaluate.models.items()}
    tokenizer = first_then_others(resolve_tokenizer, config.data, next(iter(found.values())).tokenizer)
    for name, checkpoint in found.items():
        if tokenizer_sha256(load_tokenizer(checkpoint.tokenizer)) != tokenizer_sha256(tokenizer):
            raise ConfigError(f"config.evaluate.models.{name}: its tokenizer is not {tokenizer.path}; evaluate it in a run of its own")
    key = "heldout" if config.data.heldout else "train"
    domains = first_then_others(prepare, getattr(config.data, key), config.data, tokenizer, f"config.data.{key}")
    mesh = make_mesh(config.mesh.shape(jax.device_count()))
    size, length = config.evaluate.batch_size, config.data.sequence_length

    models: dict[str, Any] = {}
    progress = tqdm(total=len(found) * len(domains), desc="evaluate", unit="domain", disable=not is_first())
    for name, checkpoint in found.items():
        model = checkpoint.about.model
        boxed = abstract_params(model)
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), param_shardings(boxed, mesh)
        )
        params = load_params(checkpoint, shapes)
        step = make_heldout_step(model, config.compute, mesh, size, length, tokenizer.eos)
        losses = {}
        for domain in domains:
            loss = heldout_loss(step, params, heldout_batches(domain, size, config.evaluate.rows), mesh)
            if loss is None:
                raise ConfigError(f"config.data: domain {domain.name!r} has no held-out document; raise config.data.heldout_fraction")
            losses[domain.name] = loss
            progress.update(1)
        total, active = parameter_counts(model)
        models[name] = {
            "nats_per_token": {d: loss.nats_per_token for d, loss in losses.items()},
            "bits_per_byte": {d: loss.bits_per_byte for d, loss in losses.items()},
            "heldout_tokens": {d: loss.tokens for d, loss in losses.items()},
            "train_tokens": int(checkpoint.about.total("tokens")),
            "train_flops": checkpoint.about.total("flops"),
            "params_total": total,
            "params_active": active,
            "load": {d: loss.load for d, loss in losses.items()} if model.moe else {},
        }
    progress.close()
    if is_first():
        write_json(workdir / RESULTS, {"domains": [d.name for d in domains], "models": models})
    finish(workdir, seconds=time.monotonic() - start)
