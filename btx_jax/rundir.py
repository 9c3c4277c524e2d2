"""The files that every stage keeps in its directory: config.json while it runs, done.json when it
has finished."""

import json
import re
from pathlib import Path
from typing import Any

from btx_jax.config.config import Config
from btx_jax.config.config_dict import differences, to_dict
from btx_jax.errors import UserError
from btx_jax.output import CONFIG, DONE, new_file
from btx_jax.parallel.hosts import first_then_others, is_first, require_shared
from btx_jax.paths import expand

# A resumed run may change where, in how much memory and how often it looks, not what it computes.
COMPUTE = ("compute.remat", "compute.kernels", "compute.unroll", "compute.loss_chunk")
RESUMABLE = ("mesh.", "checkpoint.", *COMPUTE, "data.cache", "train.eval_every", "train.eval_rows")


def is_resumable(key: str) -> bool:
    """Whether a run, on its own or in a pipeline, may go on with another value of this key."""
    return re.sub(r"^pipeline\.[^.]+\.config\.", "", key).startswith(RESUMABLE)


# What a config leaves to us (`training.start.settled`), and how it says so. The run has recorded what
# was decided.
LEFT_OPEN = {"compute.dispatch": "'auto'", "train.learning_rate": "0.0"}


def _is_left_open(difference: str) -> bool:
    key, _, change = difference.partition(": ")
    return key in LEFT_OPEN and change.endswith(f"-> {LEFT_OPEN[key]}")


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error}; delete it, or the directory it lies in"
        ) from error


def look_up(workdir: Path, config: Config) -> dict[str, Any] | None:
    """`done_of` by all processes. Raises UserError also when they do not share the directory, or the
    cache of their text."""
    done = first_then_others(done_of, workdir, config)
    require_shared(workdir, "--workdir")
    if config.data:
        require_shared(Path(expand(config.data.cache, "config.data.cache")), "config.data.cache")
    return done


def done_of(workdir: Path, config: Config) -> dict[str, Any] | None:
    """done.json if the run has finished there. Writes nothing.

    Raises UserError, with the differences, when the directory belongs to a run with another config,
    unless that run, wrong from the start, left nothing.
    """
    path, done = workdir / CONFIG, workdir / DONE
    try:
        if path.exists():
            new = to_dict(config)
            changed = [
                d
                for d in differences(read_json(path), new)
                if not is_resumable(d) and not _is_left_open(d)
            ]
            if changed and _holds_results(workdir):
                raise UserError(
                    f"{workdir} belongs to a run with another config: {'; '.join(changed)}; choose"
                    " another --workdir or undo the change"
                )
        return read_json(done) if done.exists() else None
    except OSError as error:
        raise UserError(f"--workdir: cannot read {workdir}: {error.strerror}") from error


def claim(workdir: Path, config: Config) -> dict[str, Any] | None:
    """`look_up`, and from here on the directory is this run's: it holds its resolved config. Called
    once nothing can refuse the run any more."""
    done = look_up(workdir, config)
    if is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(workdir / CONFIG, to_dict(config))
        except OSError as error:
            raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    return done


def _holds_results(workdir: Path) -> bool:
    """Whether a run, or a pipeline's runs, got further than its config and tokenizer."""
    return any(
        p.is_file() and p.name != CONFIG and p.parent.name != "tokenizer"
        for p in workdir.rglob("*")
    )


def finish(workdir: Path, **results: Any) -> None:
    """Mark the stage as finished, with what later stages want to know about it."""
    if is_first():
        write_json(workdir / DONE, results)
