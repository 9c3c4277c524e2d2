"""Trackers that also receive a run's numbers: Weights & Biases and MLflow (`config.log`).

metrics.jsonl and TensorBoard remain the record. A tracker that fails is reported once and not used
again; it never ends a run.
"""

import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from btx_jax.buckets import is_on_bucket
from btx_jax.config.config import Config, LogConfig
from btx_jax.config.config_dict import flatten, to_dict
from btx_jax.errors import Mistakes, one_line
from btx_jax.output import read_json, write_json

log = logging.getLogger(__name__)

Lines = Sequence[tuple[int, Mapping[str, float]]]  # (step, scalars) in order

FILE = "trackers.json"  # NAME:PROJECT -> this run's id in the service, for a resumed run
FINISH_SECONDS = 300  # time limit of W&B's last upload; the rest stays in WORKDIR/wandb
MAX_PARAMETER = 6000  # maximum characters of an MLflow parameter
NO_CREDENTIALS = (
    "config.log.wandb: no credentials of Weights & Biases; run `wandb login`, or set"
    " WANDB_MODE=offline and `wandb sync` the run later"
)


class Tracker(Protocol):
    """A run in a tracking service. Methods may raise anything that the service's client raises. id:
    of the run in the service."""

    id: str

    def catch_up(self, written: Lines) -> None:
        """Send those lines written before this start that the service lacks."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def finish(self, step: int, results: Mapping[str, float]) -> None:
        """Send the run's results."""

    def close(self, finished: bool) -> None: ...


def _on_disk(workdir: Path) -> Path:
    """Directory of a tracker without a server: the run's directory; for a run in a bucket, to which
    trackers cannot write, the local runs/."""
    if not is_on_bucket(workdir):
        return workdir
    local = Path("runs", workdir.name)
    local.mkdir(parents=True, exist_ok=True)
    return local


class WandB:
    """Tracker for W&B. There, rows of the same step become one row, and rows for an earlier step
    are ignored. W&B's own process may lose its last rows when it is killed, and offline every start
    writes a file of its own, so everything that the service lacks is sent again."""

    def __init__(self, config: Config, workdir: Path, run_id: str):
        import wandb

        entity, _, project = config.log.wandb.rpartition("/")
        self.id = run_id or secrets.token_hex(8)
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            group=config.log.group or None,
            name=workdir.name,
            id=self.id,
            resume="allow",
            config=to_dict(config),
            allow_val_change=True,  # a resumed run may change some
            dir=str(_on_disk(workdir)),
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
        )

    def catch_up(self, written: Lines) -> None:
        has = self._run.step
        for step, scalars in written:
            if step >= has:
                self.write(step, scalars)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self, step: int, results: Mapping[str, float]) -> None:
        self._run.summary.update(dict(results))

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Tracker for MLflow. What was sent is stored at once, except a line interrupted by a kill. The
    config is stored as parameters by the first start. A store that lacks the run, such as another
    machine's directory, gets a new run with all lines."""

    def __init__(self, config: Config, workdir: Path, run_id: str):
        # Without a server the store is a directory, which MLflow 3 supports only on request; with a
        # server, a step must not wait for it as long as MLflow would by default.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        own = (_on_disk(workdir) / "mlflow").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)
        self._held: dict[str, int] = {}  # metric -> its last step in the store
        if run_id and self._goes_on(run_id):
            self.id = run_id
            return
        experiment = self._client.get_experiment_by_name(config.log.mlflow)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(config.log.mlflow)
        )
        tags = {"group": config.log.group} if config.log.group else {}
        run = self._client.create_run(experiment_id, run_name=workdir.name, tags=tags)
        self.id = run.info.run_id
        values = flatten(to_dict(config)).items()
        parameters = [Param(mlflow_name(key), str(value)[:MAX_PARAMETER]) for key, value in values]
        for start in range(0, len(parameters), 100):  # maximum of one request
            self._client.log_batch(self.id, params=parameters[start : start + 100])

    def catch_up(self, written: Lines) -> None:
        for step, scalars in written:
            self.write(step, scalars)

    def _goes_on(self, run_id: str) -> bool:
        """Whether the run exists in the store."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._client.update_run(run_id, status="RUNNING")
        self._held = {metric.key: metric.step for metric in found.data.to_proto().metrics}
        return True

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, x, now, step)
            for name, x in ((mlflow_name(key), x) for key, x in scalars.items())
            if step > self._held.get(name, -1)
        ]
        for start in range(0, len(metrics), 1000):  # maximum of one request
            self._client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def finish(self, step: int, results: Mapping[str, float]) -> None:
        self.write(step, results)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


def mlflow_name(name: str) -> str:
    """A metric's name in MLflow's permitted characters: pass@1 -> pass_1."""
    return re.sub(r"[^\w. :/-]", "_", name, flags=re.ASCII)


KINDS: Mapping[str, Callable[[Config, Path, str], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def check(config: LogConfig, mistakes: Mistakes) -> None:
    """Add missing packages of the named trackers, and missing W&B credentials, to mistakes."""
    for name in KINDS:
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            mistakes.add(f"config.log.{name}: needs a package: pip install 'btx_jax[{name}]'")
        elif name == "wandb" and config.wandb and not _has_credentials():
            mistakes.add(NO_CREDENTIALS)


def _has_credentials() -> bool:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared"):
        return True
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception:  # an invalid key or unreadable settings
        return False


class Trackers:
    """All trackers named by config.log, as one. If not `enabled` (in every process but the first),
    there are none.

    A resumed run continues the tracker runs recorded in its workdir. They receive those lines of
    metrics.jsonl, as it was on resumption, that they lack, and nothing twice: steps between the
    last checkpoint and a kill keep the numbers that were sent first.
    """

    def __init__(self, config: Config, workdir: Path, enabled: bool = True):
        self._trackers: dict[str, Tracker] = {}
        self._told: dict[str, int] = {}  # scalar -> the last step sent by an earlier start
        self._finished = False
        if not enabled or not any(getattr(config.log, name) for name in KINDS):
            return
        file = workdir / FILE
        ids: dict[str, str] = read_json(file) if file.exists() else {}
        for name, kind in KINDS.items():
            if not (project := getattr(config.log, name)):
                continue
            known = ids.get(f"{name}:{project}", "")
            try:
                tracker = kind(config, workdir, known)
            except Exception as error:  # clients raise anything
                _failed(name, error)
                continue
            self._trackers[name] = tracker
            ids[f"{name}:{project}"] = tracker.id
        write_json(file, ids)

    def begin(self, written: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Send lines that trackers lack. written: the (step, scalars) of metrics.jsonl, before
        those after the checkpoint from which this start resumes are removed."""
        lines = list(written) if self._trackers else []
        self._each(lambda tracker: tracker.catch_up(lines))
        for step, scalars in lines:
            self._told |= {name: max(step, self._told.get(name, step)) for name in scalars}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        late = {name: x for name, x in scalars.items() if step > self._told.get(name, -1)}
        if late:
            self._each(lambda tracker: tracker.write(step, late))

    def finish(self, step: int, results: Mapping[str, float]) -> None:
        """Send the run's results."""
        self._finished = True
        self._each(lambda tracker: tracker.finish(step, results))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close(self._finished))
        self._trackers.clear()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # clients raise anything
                _failed(name, error)
                del self._trackers[name]


def _failed(name: str, error: Exception) -> None:
    told = one_line(error)[:300] or type(error).__name__
    log.warning(
        "config.log.%s: %s; disabled until the run is resumed; metrics.jsonl and TensorBoard"
        " continue",
        name,
        told,
    )
