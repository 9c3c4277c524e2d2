"""Jobs as subprocesses on this machine, several at a time."""

import graphlib
import logging
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from btx_jax.backends.jobs import Job
from btx_jax.errors import UserError

log = logging.getLogger(__name__)


class Local:
    """Runs at most `parallel` jobs at a time; the terminal output of each goes to LOGS/NAME.log."""

    def __init__(self, logs: Path, parallel: int):
        self.logs, self.parallel = logs, parallel
        self._running: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._stopping = False

    def files(self, job: Job) -> dict[str, str]:
        return {f"{job.name}.sh": shlex.join(job.command) + "\n"}

    def run(self, jobs: Sequence[Job], is_finished: Callable[[Job], bool]) -> None:
        """Run all unfinished jobs, each after those it needs. A job that fails blocks only those
        that need it. Raises UserError when one failed."""
        self.logs.mkdir(parents=True, exist_ok=True)
        by_name = {job.name: job for job in jobs}
        order = graphlib.TopologicalSorter({job.name: job.needs for job in jobs})
        order.prepare()
        failed: dict[str, str] = {}
        running: dict[Future, str] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            previous = signal.signal(signal.SIGTERM, lambda *_: self.stop())
            try:
                while order.is_active():
                    for name in order.get_ready():
                        job = by_name[name]
                        if blocked := [need for need in job.needs if need in failed]:
                            failed[name] = f"needs {blocked[0]}"
                            order.done(name)
                        elif is_finished(job):
                            log.info("%s: already finished", name)
                            order.done(name)
                        else:
                            running[pool.submit(self._run, job)] = name
                    if running:
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            name = running.pop(future)
                            if status := future.result():
                                failed[name] = f"exit status {status}, see {self.logs / name}.log"
                                log.error("%s failed: %s", name, failed[name])
                            order.done(name)
            except BaseException:
                self.stop()
                raise
            finally:
                signal.signal(signal.SIGTERM, previous)
        if failed:
            told = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise UserError(
                f"{len(failed)} of {len(jobs)} jobs did not finish ({told}); fix this and run"
                " the same command to resume"
            )

    def _run(self, job: Job) -> int:
        with self._lock:
            if self._stopping:
                return 128 + signal.SIGTERM
            terminal = (self.logs / f"{job.name}.log").open("ab")
            process = subprocess.Popen(job.command, stdout=terminal, stderr=subprocess.STDOUT)
            self._running.append(process)
        log.info("%s: started, process %d", job.name, process.pid)
        status = process.wait()
        terminal.close()
        with self._lock:
            self._running.remove(process)
        if not status:
            log.info("%s: finished", job.name)
        return status

    def stop(self) -> None:
        """Send SIGTERM to every job, which saves its last complete step and ends."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()
