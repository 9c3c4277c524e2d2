"""Evaluate: held-out loss of every model and ensemble on every domain, test sets, and routing of
mixtures. Writes results.json.

Results are saved under WORKDIR/parts as they come, so that an interrupted evaluation resumes where
it stopped.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from btx_jax.checkpoints.checkpoint import Checkpoint, find_checkpoint, load_for_inference
from btx_jax.checkpoints.training_state import CheckpointMetadata, together
from btx_jax.config.config import Config, EnsembleConfig, OracleConfig, TaskConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.mixture import first_rows, heldout_rows
from btx_jax.data.prepare import (
    check_text,
    prepare,
    prepare_by_all,
    resolve_tokenizer,
    texts,
)
from btx_jax.data.prepared import PreparedDomain, none_heldout
from btx_jax.data.sources import Domain, parse_domains
from btx_jax.data.tokenizers import Tokenizer, check_ids, difference, load_tokenizer
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.evaluation import btm, lora, oracle, routing
from btx_jax.evaluation.continuation import continuation, stop_ids
from btx_jax.evaluation.explain import explain
from btx_jax.evaluation.generation import Generator
from btx_jax.evaluation.heldout import HeldoutLoss, Rows, make_heldout_step, mean_loss, token_losses
from btx_jax.evaluation.tasks import Candidate, TestSet, read_test_set, scores, too_long
from btx_jax.models.llama import parameter_counts
from btx_jax.output import new_file, read_json, write_json
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.parallel.sharding import make_mesh
from btx_jax.progress import bar
from btx_jax.reporting import trackers
from btx_jax.reporting.metrics import numbers
from btx_jax.reporting.summary import loss_table, print_tables, task_table
from btx_jax.rundir import claim, finish, look_up
from btx_jax.stages import Coming, require_right

log = logging.getLogger(__name__)

RESULTS, PARTS, INPUTS = "results.json", "parts", "inputs.json"
PROFILE_ROWS = 128  # training rows from which an expert's tf-idf profile is made


def run(config: Config, workdir: Path) -> None:
    assert config.evaluate and config.compute and config.mesh
    start = time.monotonic()
    done = look_up(workdir, config)
    if done is None:
        require_right(config)
    found = {
        name: find_checkpoint(path, f"config.evaluate.models.{name}")
        for name, path in config.evaluate.models.items()
    }
    items = {
        name: read_test_set(task, f"config.evaluate.tasks.{name}")
        for name, task in config.evaluate.tasks.items()
    }
    inputs = {f"models.{name}": checkpoint.identity() for name, checkpoint in found.items()}
    inputs |= {f"tasks.{name}": _hash(of_task) for name, of_task in items.items()}
    if config.evaluate.prompts:
        inputs["prompts"] = _hash([*config.evaluate.prompts, config.evaluate.prompt_tokens])
    require_same(workdir / INPUTS, inputs)
    if done is not None:
        log.info("%s: already finished", workdir)
        show(workdir)
        return
    tokenizers = {name: load_tokenizer(checkpoint.tokenizer) for name, checkpoint in found.items()}
    shape = config.mesh.shape(jax.device_count())
    shards = math.prod(shape[:3])
    spread = dataclasses.replace(
        config.evaluate, batch_size=-(-config.evaluate.batch_size // shards) * shards
    )
    config = dataclasses.replace(config, evaluate=spread)
    heldout, profiles = read_heldout(config, found, tokenizers) if config.data else ({}, {})
    inputs |= {
        f"text.{name}": hashlib.sha256(rows["tokens"].tobytes()).hexdigest()[:16]
        for name, rows in heldout.items()
    }
    require_same(workdir / INPUTS, inputs)
    claim(workdir, config)
    if is_first():
        write_json(workdir / INPUTS, inputs)
    mesh = make_mesh(shape)

    models: dict[str, Any] = {}
    progress = bar(
        total=len(found) * len(heldout),
        desc="evaluate",
        unit="domain",
        shown=is_first() and bool(heldout),
    )
    for name, checkpoint in found.items():
        folder = workdir / PARTS / name
        models[name] = part(
            folder / "result.json",
            evaluate_model,
            checkpoint,
            config,
            tokenizers[name],
            heldout,
            mesh,
            folder,
            progress,
        )
        if items:
            models[name] |= {
                "tasks": run_tasks(name, checkpoint, config, tokenizers[name], items, mesh, folder)
            }
        if spread.prompts:
            samples = part(
                folder / "samples.json", continued, checkpoint, config, tokenizers[name], mesh
            )
            models[name] |= {"samples": samples}
    for name, ensemble in (
        spread.ensembles.items() if is_first() else ()
    ):  # only the first process wrote the token losses
        eos = next(iter(tokenizers.values())).eos
        models[name] = ensemble_result(
            ensemble, heldout, workdir / PARTS, profiles.get(name), found, eos
        )
    for name, sent in spread.oracles.items():
        folder = workdir / PARTS / name
        models[name] = part(
            folder / "result.json",
            oracle_result,
            sent,
            found[sent.mixture],
            config,
            tokenizers[sent.mixture],
            heldout,
            mesh,
        )
    progress.close()
    if is_first():
        roles = {key: getattr(config.evaluate, key) for key in ("seed", "experts", "mixture")}
        results = {"domains": list(heldout), "models": models, "roles": roles}
        write_json(workdir / RESULTS, results)
        tell(config, workdir, models)
    finish(workdir, seconds=time.monotonic() - start)
    show(workdir)


def tell(config: Config, workdir: Path, models: Mapping[str, Any]) -> None:
    """Send the results of every model to the trackers."""
    keys = ("nats_per_token", "bits_per_byte", "tasks")
    measured = {
        name: {key: model[key] for key in keys if key in model} for name, model in models.items()
    }
    told = trackers.Trackers(config, workdir)
    told.finish(0, numbers(measured))
    told.close()


def show(workdir: Path) -> None:
    """Print the tables of results."""
    if not is_first():
        return
    results = read_json(workdir / RESULTS)
    models = results["models"]
    tables = [loss_table(models, results["domains"])] if results["domains"] else []
    if any("tasks" in model for model in models.values()):
        tables.append(task_table(models))
    print_tables(tables)
    log.info("wrote %s", workdir / RESULTS)


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.evaluate and config.mesh
    models: dict[str, ModelConfig] = {}
    for name, path in config.evaluate.models.items():
        with mistakes.gather():
            if path in coming:
                model = coming[path]
            else:
                found = find_checkpoint(path, f"config.evaluate.models.{name}")
                model = found.metadata.model
                load_tokenizer(found.tokenizer)
            if model is not None:
                models[name] = model
                for told in _too_long(config, name, model.context):
                    mistakes.add(told)
    for name, task in config.evaluate.tasks.items():
        with mistakes.gather():
            read_test_set(task, f"config.evaluate.tasks.{name}")
    if config.data:
        profiles = [
            (f"config.evaluate.ensembles.{name}.experts.{expert}", domain)
            for name, ensemble in config.evaluate.ensembles.items()
            for expert, domain in ensemble.experts.items()
            if ensemble.weights == "tf_idf"
        ]
        domains: tuple[Domain, ...] = ()
        with mistakes.gather():
            check_text(config.data, [texts(config.data)[-1], *profiles])
            domains = parse_domains(texts(config.data)[-1][1], config.data.domains, "config.data")
        for key, sent in config.evaluate.oracles.items():
            for told in _no_oracle(key, sent, models, [domain.name for domain in domains]):
                mistakes.add(told)
    trackers.check(config.log, mistakes)
    with mistakes.gather():
        config.mesh.shape(jax.device_count())
    return None


def _too_long(config: Config, name: str, context: int) -> Iterator[str]:
    """Yield a message for everything that does not fit into a model's context."""
    assert config.evaluate
    if config.data and config.data.sequence_length > context:
        yield (
            f"config.data.sequence_length={config.data.sequence_length}:"
            f" config.evaluate.models.{name} has a context of {context}; lower it"
        )
    if config.evaluate.prompts and config.evaluate.prompt_tokens >= context:
        yield (
            f"config.evaluate.prompt_tokens={config.evaluate.prompt_tokens}:"
            f" config.evaluate.models.{name} has a context of {context}; lower it"
        )
    for task_name, task in config.evaluate.tasks.items():
        if too_long(task, context):
            yield (
                f"config.evaluate.tasks.{task_name}.max_tokens={task.max_tokens}:"
                f" config.evaluate.models.{name} has a context of {context}; leave the task or the"
                " model out"
            )


def _no_oracle(
    name: str, sent: OracleConfig, models: Mapping[str, ModelConfig], domains: Sequence[str]
) -> Iterator[str]:
    """Yield messages that say why the tokens of a mixture cannot be routed as the oracle asks."""
    key = f"config.evaluate.oracles.{name}"
    if domains and (others := set(domains) ^ set(sent.experts)):
        yield (
            f"{key}.experts: {', '.join(sorted(others))}: the domains must be exactly those"
            " of the held-out text"
        )
    if model := models.get(sent.mixture):
        for domain, expert in sent.experts.items():
            try:
                oracle.check(model, expert, f"{key}.experts.{domain}: {sent.mixture}")
            except ConfigError as error:
                yield from error.args


def require_same(file: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError when earlier results in this directory come from other weights or items; the
    new results would be mixed with them."""
    before = read_json(file) if file.exists() else {}
    if changed := [name for name, value in inputs.items() if before.get(name, value) != value]:
        told = f"{', '.join(changed)}: differs from what was measured there before"
        raise UserError(
            f"{file.parent}: {told}; choose another directory, or delete this one to measure again"
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_heldout(
    config: Config, found: Mapping[str, Checkpoint], tokenizers: Mapping[str, Tokenizer]
) -> tuple[dict[str, Rows], dict[str, btm.DomainProfiles]]:
    """(domain -> held-out rows, tf-idf ensemble -> profiles). Raises ConfigError when the models'
    tokenizers differ, as losses per token would not be comparable."""
    assert config.evaluate and config.data
    tokenizer = first_then_others(
        resolve_tokenizer, config.data, next(iter(tokenizers.values())).path.parent
    )
    for name, own in tokenizers.items():
        rows_of_model = found[name].metadata.model.vocab_size
        if told := difference(tokenizer, own, rows_of_model):
            if not told.startswith("adds "):
                raise ConfigError(
                    f"config.evaluate.models.{name}: its tokenizer is not {tokenizer.path}: {told};"
                    " evaluate it in a separate run"
                )
            log.warning("%s: its tokenizer %s; text is tokenised without them", name, told)
    key = "heldout" if config.data.heldout else "train"
    domains = prepare_by_all(
        getattr(config.data, key), config.data, tokenizer, f"config.data.{key}"
    )
    rows: dict[str, Rows] = {
        domain.name: heldout_rows(domain, config.evaluate.rows) for domain in domains
    }
    for domain in domains:
        tokens = rows[domain.name]["tokens"]
        if not len(tokens):
            raise ConfigError(f"config.data: {none_heldout(domain)}")
        for model, checkpoint in found.items():
            where = f"config.evaluate.models.{model}: domain {domain.name!r}"
            check_ids([int(tokens.max())], checkpoint.metadata.model.vocab_size, where, tokenizer)
    return rows, first_then_others(read_profiles, config, tokenizer)


def part(file: Path, make: Callable[..., Any], *args: Any) -> Any:
    """The result of make(*args), cached in a file."""
    if not file.exists():
        value = make(*args)
        if is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, value)
        return value
    return read_json(file)


def load_losses(file: Path) -> np.ndarray:
    with file.open("rb") as opened:
        return np.load(opened)


def evaluate_model(
    checkpoint: Checkpoint,
    config: Config,
    tokenizer: Tokenizer,
    all_rows: Mapping[str, Rows],
    mesh: Mesh,
    folder: Path,
    progress: tqdm,
) -> dict[str, Any]:
    """One model's entry in results.json; the losses of all held-out tokens are written to
    FOLDER/DOMAIN.npy."""
    assert config.evaluate and config.compute
    model, batch_size = checkpoint.metadata.model, config.evaluate.batch_size
    total, active = parameter_counts(model)
    counts = checkpoint.metadata.costs() | {"params_total": total, "params_active": active}
    if not config.data:
        return loss_entries({}) | counts
    params = load_for_inference(
        checkpoint, mesh, "float32"
    )  # expert similarity depends on the last bits
    step = make_heldout_step(model, config.compute, mesh)
    losses: dict[str, HeldoutLoss] = {}
    routed: dict[str, Any] = {}
    gated: dict[str, Any] = {}
    for domain, rows in all_rows.items():
        nll, sums, gates = token_losses(step, params, rows, batch_size, mesh)
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            with new_file(folder / f"{domain}.npy") as partial, partial.open("wb") as opened:
                np.save(opened, nll)
        loss = mean_loss(nll, rows, tokenizer.eos)
        assert loss is not None
        losses[domain] = loss
        if sums is not None:
            routed[domain] = routing.summarise(sums)
        gated[domain] = lora.by_target(model, gates)
        progress.update(1)
    result = loss_entries(losses) | counts
    if routed:
        load = {domain: values["load"] for domain, values in routed.items()}
        result["routing"] = {
            "domains": routed,
            "mutual_information": routing.mutual_information(load),
            "redundancy": routing.redundancy(params, mesh),
            "texts": explain(
                model,
                config.compute,
                params,
                tokenizer,
                shown_texts(config, tokenizer, all_rows),
                mesh,
            ),
        }
    if model.lora:
        specs = model.lora.specs(model.layers)
        experts = [spec.experts if spec else 0 for spec in specs]
        result["lora"] = {
            "experts": experts,
            "domains": gated,
            "redundancy": lora.redundancy(model, params),
        }
    return result


def run_tasks(
    name: str,
    checkpoint: Checkpoint,
    config: Config,
    tokenizer: Tokenizer,
    test_sets: Mapping[str, TestSet],
    mesh: Mesh,
    folder: Path,
) -> dict[str, Any]:
    """Metrics of every task; the model's answer to each item is written to FOLDER/TASK.json."""
    assert config.evaluate and config.compute
    size, compute = config.evaluate.batch_size, config.compute

    @functools.cache
    def candidate() -> Candidate:
        params = load_for_inference(checkpoint, mesh, compute.dtype)
        stops = stop_ids(checkpoint.metadata, tokenizer)
        model = checkpoint.metadata.model
        return Candidate(model, params, compute, mesh, tokenizer, stops, size)

    def run_task(key: str, task: TaskConfig) -> dict[str, Any]:
        return candidate().try_on(test_sets[key], task, f"{name}: {key}")

    return {
        key: scores(part(folder / f"{key}.json", run_task, key, task))
        for key, task in config.evaluate.tasks.items()
    }


def continued(
    checkpoint: Checkpoint, config: Config, tokenizer: Tokenizer, mesh: Mesh
) -> list[dict[str, Any]]:
    """For every prompt, a dict with keys prompt, text (its greedy continuation) and, for a mixture,
    explained (prompt and continuation with the experts of every token)."""
    assert config.evaluate and config.compute
    model, wanted = checkpoint.metadata.model, config.evaluate
    params = load_for_inference(checkpoint, mesh, config.compute.dtype)
    generator = Generator(
        model, params, config.compute, mesh, stop_ids(checkpoint.metadata, tokenizer)
    )
    prompts = [tokenizer.encode_prompt(prompt) for prompt in wanted.prompts]
    # Rounded up to a number of rows that is divisible by the number of devices.
    rows = -(-len(prompts) // mesh.size) * mesh.size
    padded = [*prompts, *prompts[:1] * (rows - len(prompts))]
    new = generator.generate(padded, wanted.prompt_tokens)[: len(prompts)]
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "text": continuation(tokenizer, ids, added)[0]}
        for prompt, ids, added in zip(wanted.prompts, prompts, new, strict=True)
    ]
    if model.moe:
        whole = {str(i): [*ids, *new[i]] for i, ids in enumerate(prompts)}
        shown = explain(model, config.compute, params, tokenizer, whole, mesh)
        for i, sample in enumerate(samples):
            sample["explained"] = shown[str(i)]
    return samples


def loss_entries(losses: Mapping[str, HeldoutLoss]) -> dict[str, Any]:
    return {
        "nats_per_token": {domain: loss.nats_per_token for domain, loss in losses.items()},
        "bits_per_byte": {domain: loss.bits_per_byte for domain, loss in losses.items()},
        "heldout_tokens": {domain: loss.tokens for domain, loss in losses.items()},
    }


def shown_texts(
    config: Config, tokenizer: Tokenizer, all_rows: Mapping[str, Rows]
) -> dict[str, list[int]]:
    """Token ids of the texts for which each token's experts are shown: the beginning of each
    domain's first held-out document, and config.evaluate.texts."""
    assert config.evaluate
    shown = {}
    for domain, rows in all_rows.items() if config.evaluate.shown_tokens else ():
        start, end = next(btm.documents(rows["segments"][0]))
        shown[domain] = rows["tokens"][
            0, start : min(end, start + config.evaluate.shown_tokens)
        ].tolist()
    return shown | {
        name: tokenizer.encode_prompt(text) for name, text in config.evaluate.texts.items()
    }


def read_profiles(config: Config, tokenizer: Tokenizer) -> dict[str, btm.DomainProfiles]:
    """Domain profiles for every tf-idf ensemble."""
    assert config.evaluate and config.data
    profiles = {}
    for name, ensemble in config.evaluate.ensembles.items():
        if ensemble.weights != "tf_idf":
            continue
        documents = {}
        for expert, domain in ensemble.experts.items():
            (prepared,) = prepare(
                domain, config.data, tokenizer, f"config.evaluate.ensembles.{name}.experts.{expert}"
            )
            documents[expert] = row_documents(prepared)
        profiles[name] = btm.DomainProfiles(documents)
    return profiles


def row_documents(domain: PreparedDomain) -> list[list[int]]:
    rows = first_rows(domain, PROFILE_ROWS)
    return [
        row[start:end].tolist()
        for row, segments in zip(rows["tokens"], rows["segments"], strict=True)
        for start, end in btm.documents(segments)
    ]


def ensemble_result(
    ensemble: EnsembleConfig,
    all_rows: Mapping[str, Rows],
    parts: Path,
    profiles: btm.DomainProfiles | None,
    found: Mapping[str, Checkpoint],
    eos: int | None,
) -> dict[str, Any]:
    """An ensemble's entry, from the token losses of its experts. Its cost is the sum of theirs."""
    losses = {}
    for domain, rows in all_rows.items():
        nll = np.stack(
            [load_losses(parts / expert / f"{domain}.npy") for expert in ensemble.experts]
        )
        if profiles is not None:
            weights = btm.tf_idf_weights(profiles, rows["tokens"], rows["segments"], ensemble.top)
        else:
            weights = btm.bayes_weights(
                nll, rows["segments"], updating=ensemble.weights == "bayes_updating"
            )
        loss = mean_loss(btm.ensemble_nll(nll, weights), rows, eos)
        assert loss is not None
        losses[domain] = loss
    experts = [found[expert].metadata for expert in ensemble.experts]
    whole = CheckpointMetadata(
        experts[0].model, 0, together(metadata.history for metadata in experts)
    )
    counts = [parameter_counts(metadata.model) for metadata in experts]
    answering = ensemble.top if ensemble.weights == "tf_idf" else len(experts)
    total, active = (
        sum(total for total, _ in counts),
        sum(sorted(active for _, active in counts)[-answering:]),
    )
    return loss_entries(losses) | whole.costs() | {"params_total": total, "params_active": active}


def oracle_result(
    sent: OracleConfig,
    checkpoint: Checkpoint,
    config: Config,
    tokenizer: Tokenizer,
    all_rows: Mapping[str, Rows],
    mesh: Mesh,
) -> dict[str, Any]:
    """Losses of a mixture whose tokens are sent to a given expert by domain. Its cost is the
    mixture's."""
    assert config.evaluate and config.compute
    model = checkpoint.metadata.model
    params = load_for_inference(checkpoint, mesh, "float32")
    step = make_heldout_step(model, config.compute, mesh)
    losses = {}
    for domain, rows in all_rows.items():
        own = oracle.told(params, sent.experts[domain])
        nll, *_ = token_losses(step, own, rows, config.evaluate.batch_size, mesh)
        loss = mean_loss(nll, rows, tokenizer.eos)
        assert loss is not None
        losses[domain] = loss
    total, active = parameter_counts(model)
    counts = checkpoint.metadata.costs() | {"params_total": total, "params_active": active}
    return loss_entries(losses) | counts
