"""A run's directory: owned through a lock and config.json, which exists from the start; done.json
exists once the run has finished. hub.json records the commits of names on the Hub, plan.json what
`btx plan` expected of the run."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from btx_jax import buckets, claims, hub, hub_names
from btx_jax.config.config import Config
from btx_jax.config.config_dict import Difference, differences, to_dict
from btx_jax.errors import UserError
from btx_jax.output import locked, none_left_empty, read_json, require_renames, write_json
from btx_jax.parallel.hosts import first_then_others, is_first, require_shared, text_of_first
from btx_jax.paths import to_path

CONFIG, DONE, COMMITS, PLAN = "config.json", "done.json", "hub.json", "plan.json"

# Keys that a resumed run may change: where it runs, memory usage, what it evaluates and logs; not
# what it computes.
COMPUTE = (
    "compute.remat",
    "compute.kernels",
    "compute.unroll",
    "compute.loss_chunk",
    "compute.compiler_options",
)
LOOKS = (
    "train.eval_every", "train.eval_rows", "train.eval_tasks", "train.mixing_probe", "data.tasks",
    "profile.",
)  # fmt: skip
RESUMABLE = ("mesh.", "checkpoint.", *COMPUTE, "data.cache", *LOOKS, "log.", "project")


def is_resumable(key: str) -> bool:
    """Whether a run, alone or in a pipeline, may resume with another value of this key."""
    return re.sub(r"^pipeline\.[^.]+\.config\.", "", key).startswith(RESUMABLE)


# Config values that leave a choice to `training.start.settled`; the run has recorded what was
# chosen.
LEFT_OPEN = {"compute.dispatch": "auto", "train.learning_rate": 0.0}


def _is_left_open(difference: Difference) -> bool:
    return difference.key in LEFT_OPEN and difference.new == LEFT_OPEN[difference.key]


def _changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Differences between the project fields that the two configs were made from; all their other
    differences follow from these. Empty if either config was not made from a project."""
    if not (old.get("project") and new.get("project")):
        return []
    before, after = (
        {f"project.{name}": json.loads(value) for name, _, value in fields}
        for fields in ([field.partition("=") for field in each["project"]] for each in (old, new))
    )
    return differences(before, after)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Hold the directory, created if missing, while the block runs. Raises UserError when another
    process is running there (on this machine or, in a bucket, on any), or nothing can be written
    there. A block that fails leaves no new empty directory."""
    if str(workdir).startswith("s3://"):
        raise UserError(
            f"--workdir={str(workdir)!r}: not supported on S3, as Orbax completes a checkpoint"
            " by renaming, which S3 lacks; use a disk or gs://"
        )
    buckets.require(workdir, "--workdir")
    buckets.require_whole(workdir, "--workdir")
    with contextlib.ExitStack() as taken:
        taken.enter_context(none_left_empty(workdir / "checkpoints"))
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--workdir: cannot write to {str(workdir)[:200]!r}:"
                f" {getattr(error, 'strerror', error)}"
            ) from error
        try:
            taken.enter_context(locked(workdir))
        except BlockingIOError:
            raise UserError(
                f"{workdir}: another process is using it; wait for it or choose another directory"
            ) from None
        except Exception as error:
            if refused := buckets.told(error):
                raise UserError(f"--workdir: cannot write to {workdir}: {refused}") from error
            if not isinstance(error, OSError):  # raised by file systems without locks
                raise
        yield


def has_begun(workdir: Path) -> bool:
    """Whether a run has claimed this directory."""
    return (workdir / CONFIG).exists()


def has_finished(workdir: Path) -> bool:
    return (workdir / DONE).exists()


def recorded_config(workdir: Path) -> dict[str, Any]:
    """The config of the run there, as `to_dict` returns it; empty without one."""
    return read_json(workdir / CONFIG) if has_begun(workdir) else {}


def recorded_results(workdir: Path) -> dict[str, Any] | None:
    """The results that the run recorded on finishing (`finish`); None if it has not finished."""
    return read_json(workdir / DONE) if has_finished(workdir) else None


def was_made_before(workdir: Path, other: Path) -> bool:
    """Whether both runs have finished, this one before the other."""
    first, second = workdir / DONE, other / DONE
    return second.exists() and second.stat().st_mtime > first.stat().st_mtime


def settle_names(workdir: Path, config: Config) -> None:
    """Resolve names on the Hub in the config to the commits that the run used, if it has begun.
    With several processes, the first downloads, and the others use the same commits."""
    if (workdir / COMMITS).is_file():
        hub.pin(read_json(workdir / COMMITS))
    if jax.process_count() == 1:
        return
    if not is_first():
        hub.without_bars()
    first_then_others(lambda: _fetch_names(config) if is_first() else None)
    hub.pin(json.loads(text_of_first(json.dumps(hub.pins()))))


def _fetch_names(config: Config) -> None:
    for stage in (config, *(stage.config for stage in (config.pipeline or {}).values())):
        for key, name, kind in _names(stage):
            if name.startswith("@") or not (found := hub_names.named(name, key)):
                continue
            if found.type == "dataset":
                hub.commit(found, key)
            else:
                hub.resolve(name, key, kind)


def _names(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield (key, possible name on the Hub, kind) for everything that a config reads."""
    yield "config.init", config.init or "", hub.MODEL
    if mix := config.mix:
        for i, expert in enumerate(mix.experts):
            yield f"config.mix.experts[{i}]", expert, hub.MODEL
        for key in ("shared_expert", "base"):
            yield f"config.mix.{key}", getattr(mix, key), hub.MODEL
    if evaluate := config.evaluate:
        for name, path in evaluate.models.items():
            yield f"config.evaluate.models.{name}", path, hub.MODEL
        for name, task in evaluate.tasks.items():
            for key in ("file", "shots_file"):
                yield f"config.evaluate.tasks.{name}.{key}", getattr(task, key), ""
    if data := config.data:
        yield "config.data.tokenizer", data.tokenizer, hub.TOKENIZER
        for notation in (data.train, data.heldout, *data.domains.values()):
            for where in map(str.strip, notation.split(",")):
                if where.startswith(hub_names.PROTOCOL):
                    yield "config.data", where.partition("#")[0], ""


def look_up(workdir: Path, config: Config) -> dict[str, Any] | None:
    """`done_of`, called by all processes. Also raises UserError when they do not share the
    directory, or the cache of tokenised text."""
    done = first_then_others(done_of, workdir, config)
    require_shared(workdir, "--workdir")
    if config.data:
        require_shared(to_path(config.data.cache, "config.data.cache"), "config.data.cache")
    return done


def done_of(workdir: Path, config: Config) -> dict[str, Any] | None:
    """The contents of done.json if the run has finished. Writes nothing. Raises UserError, with the
    differences, when the directory belongs to a run with another config, unless that run failed
    early and left nothing."""
    try:
        if has_begun(workdir):
            old, new = recorded_config(workdir), to_dict(config)
            changed = [
                difference
                for difference in differences(old, new)
                if not is_resumable(difference.key) and not _is_left_open(difference)
            ]
            if changed and _holds_results(workdir):
                told = "; ".join(map(str, _changed_fields(old, new) or changed))
                raise UserError(
                    f"{workdir} belongs to a run with a different config: {told}; choose"
                    " another --workdir or undo the change"
                )
        return recorded_results(workdir)
    except OSError as error:
        raise UserError(f"--workdir: cannot read {workdir}: {error.strerror or error}") from error


def claim(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Call `look_up`, then claim the directory for this run by writing its resolved config there.
    To be called once nothing can refuse the run any more. Returns the result of `look_up`."""
    done = look_up(workdir, config)
    if is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            require_renames(workdir, "--workdir")
            write_json(workdir / CONFIG, to_dict(config))
            if commits := hub.pins():
                write_json(workdir / COMMITS, commits)
        except OSError as error:
            raise UserError(
                f"--workdir: cannot write to {workdir}: {error.strerror or error}"
            ) from error
    return done


def _holds_results(workdir: Path) -> bool:
    """Whether a run, or any run of a pipeline, has written more than its config and tokenizer."""
    own = (CONFIG, COMMITS, PLAN)
    return any(
        p.is_file() and p.name not in own and p.parent.name not in ("tokenizer", claims.FOLDER)
        for p in workdir.rglob("*")
    )


def finish(workdir: Path, **results: Any) -> None:
    """Mark the stage as finished, with the results that later stages need."""
    if is_first():
        write_json(workdir / DONE, results)
