"""Pipeline: run stages in dependency order. Finished stages are skipped, interrupted ones resume,
and a failed branch stops only the stages that need it. Each stage runs in WORKDIR/NAME; the output
of a report stage is copied to WORKDIR."""

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx_jax import stages
from btx_jax.config.config import Config, PipelineStage
from btx_jax.config.config_dict import from_dict, to_dict
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.prepare import changed_text
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.parallel.hosts import first_then_others, is_first
from btx_jax.rundir import (
    CONFIG,
    DONE,
    claim,
    done_of,
    finish,
    has_finished,
    look_up,
    recorded_results,
    was_made_before,
)
from btx_jax.training.storage import shortage, storage

SHOWN = 3  # changed files to name

log = logging.getLogger(__name__)


def run(config: Config, workdir: Path, only: str = "") -> None:
    """Run the pipeline. only: run only this stage, in WORKDIR/ONLY. Raises ConfigError when it does
    not exist, UserError when stages that it needs have not finished."""
    assert config.pipeline
    start = time.monotonic()
    resolved = resolved_stages(config, workdir)
    order = list(resolved)
    if only:
        if only not in resolved:
            raise ConfigError(f"--only={only}: no such stage; known: {', '.join(order)}")
        if missing := [
            need for need in config.pipeline[only].needs if not has_finished(workdir / need)
        ]:
            raise UserError(
                f"--only={only}: needs {', '.join(missing)}, which has not finished"
                f" in {workdir}; run it first"
            )
        first_then_others(require_same_text, resolved, workdir)
        stages.run(resolved[only], workdir / only)
        return
    look_up(workdir, config)
    models = check_stages(resolved, workdir)
    first_then_others(require_same_text, resolved, workdir)
    needed = {workdir / name: storage(resolved[name], model) for name, model in models.items()}
    if is_first() and (short := shortage(needed, workdir)):
        log.warning("%s", short)
    claim(workdir, config)
    failed: dict[str, str] = {}
    waiting: list[str] = []
    for number, name in enumerate(order, start=1):
        if blocked := [need for need in config.pipeline[name].needs if need in failed]:
            failed[name] = f"needs {blocked[0]}"
            waiting.append(name)
            continue
        finished = has_finished(workdir / name)
        log.info("[%d/%d] %s%s", number, len(order), name, ": already finished" if finished else "")
        if finished:
            for need in config.pipeline[name].needs:
                if was_made_before(workdir / name, workdir / need):
                    log.warning(
                        "%s was made from an earlier %s; delete %s to make it again",
                        name,
                        need,
                        workdir / name,
                    )
            continue
        if resolved[name].data:
            first_then_others(require_same_text, resolved, workdir)
        try:
            stages.run(resolved[name], workdir / name)
        except Exception as error:  # a failed branch must not end the others; reported below
            if not isinstance(error, UserError):
                log.exception("stage %s failed", name)
            failed[name] = str(error) or type(error).__name__
            log.error("%s failed: %s", name, failed[name])
    if failed:
        causes = [f"{name}: {why}" for name, why in failed.items() if name not in waiting]
        told = "; ".join(
            causes + [f"not started because of these: {', '.join(waiting)}"] * bool(waiting)
        )
        raise UserError(
            f"{len(failed)} of {len(order)} stages did not finish ({told}); fix this and run"
            " the same command to resume"
        )
    for name in (name for name in order if resolved[name].stage == "report" and is_first()):
        for file in (workdir / name).glob("*.*"):
            if file.name not in (CONFIG, DONE):
                (workdir / file.name).write_bytes(file.read_bytes())
                log.info("wrote %s", workdir / file.name)
    finish(workdir, seconds=time.monotonic() - start)


def resolved_stages(config: Config, workdir: Path) -> dict[str, Config]:
    """The stages in execution order, as they will run in this directory. Raises ConfigError."""
    assert config.pipeline
    mistakes, resolved = Mistakes(), dict[str, Config]()
    for name in in_order(config.pipeline):
        with mistakes.gather():
            resolved[name] = resolve(name, config.pipeline[name], config, workdir)
    mistakes.tell()
    return resolved


def check_stages(resolved: Mapping[str, Config], workdir: Path) -> dict[str, ModelConfig]:
    """The models that unfinished stages will write, by stage, where they are known. Raises
    ConfigError with all known mistakes in these stages, before the first of them runs."""
    mistakes = Mistakes()
    left = {name: stage for name, stage in resolved.items() if not has_finished(workdir / name)}
    for name, stage in left.items():
        with mistakes.gather():
            done_of(workdir / name, stage)
    models = find_mistakes(left, workdir, mistakes)
    mistakes.tell()
    return models


def require_same_text(resolved: Mapping[str, Config], workdir: Path) -> None:
    """Raise UserError, naming the files, when text has changed since the pipeline prepared it: its
    stages would learn from, and be measured on, different texts."""
    for name, stage in resolved.items():
        done = recorded_results(workdir / name) if stage.stage == "prepare" else None
        if not done or "files" not in done:
            continue
        assert stage.data
        changed: list[str] = []
        with contextlib.suppress(UserError):  # reported by the stages that still have to read it
            changed = changed_text(stage.data, done["files"])
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise UserError(
                f"{workdir}: {', '.join(changed[:SHOWN])}{more}, but a run must keep the text"
                f" it started with; restore it, choose another --workdir, or delete {workdir}"
                " to start over"
            )


def find_mistakes(
    resolved: Mapping[str, Config], workdir: Path, mistakes: Mistakes
) -> dict[str, ModelConfig]:
    """Add all known mistakes in these stages; one that several stages share is reported once.
    Returns the models that they will write, by stage, where they are known."""
    coming: dict[str, ModelConfig | None] = {}
    stages_of: dict[str, list[str]] = {}
    for name, stage in resolved.items():
        own = Mistakes()
        coming[str(workdir / name)] = stages.check(stage, coming, own)
        for told in own.found:
            stages_of.setdefault(told, []).append(name)
    for told, names in stages_of.items():
        within = f"config.pipeline.{names[0]}.config."
        whole = within + told.removeprefix("config.") if told[:7] == "config." else told
        mistakes.add(f"{whole} (also in {', '.join(names[1:])})" if names[1:] else whole)
    return {name: model for name in resolved if (model := coming[str(workdir / name)])}


def in_order(pipeline: Any) -> list[str]:
    """Stage names, each after those it needs, otherwise in the order listed. Raises ConfigError for
    a cycle."""
    order: list[str] = []
    while len(order) < len(pipeline):
        ready = [
            name
            for name, stage in pipeline.items()
            if name not in order and all(need in order for need in stage.needs)
        ]
        if not ready:
            raise ConfigError(
                f"config.pipeline: {', '.join(sorted(set(pipeline) - set(order)))} depend on"
                " each other in a cycle"
            )
        order.append(ready[0])
    return order


def resolve(name: str, stage: PipelineStage, config: Config, workdir: Path) -> Config:
    """The stage's config with `@NAME` replaced by directories, the pipeline's rng_seed added to its
    own, and the pipeline's trackers if it names none. Raises ConfigError for an @NAME that is not
    in needs."""

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, str) and value.startswith("@"):
            if value[1:] not in stage.needs:
                raise ConfigError(
                    f"config.pipeline.{name}: uses {value}, which is not listed in its needs"
                    f" ({', '.join(stage.needs) or 'none'}); add it"
                )
            return str(workdir / value[1:])
        return value

    values = replace(to_dict(stage.config))
    values["rng_seed"] += config.rng_seed
    told = {key: own or getattr(config.log, key) for key, own in values["log"].items()}
    values["log"] = told | {"group": told["group"] or (workdir.name if any(told.values()) else "")}
    return from_dict(Config, values, f"config.pipeline.{name}.config")
