"""One queued resource per stage (gcloud compute tpus queued-resources): a TPU VM slice that is
created when capacity is available.

Every host of the slice runs a start-up script: install btx_jax, run the stage, and, once done.json
exists, delete the slice. The script runs again when a machine restarts, and the run resumes. A
preempted slice leaves its request SUSPENDED; the submitter, while it runs, renews the request. A
failed stage leaves its slice running for inspection, which is billed.
"""

import logging
import shlex
import tempfile
from pathlib import Path

from btx_jax.backends.cloud import Place, ask, require
from btx_jax.backends.jobs import Job, parse_topology
from btx_jax.errors import UserError
from btx_jax.rundir import DONE

log = logging.getLogger(__name__)

LOST = ("SUSPENDED", "FAILED")
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

STARTUP = """#!/bin/bash
set -euo pipefail
# The machines' own Python is 3.10; docs/tpu.md was compiled on 3.11.
command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR=/usr/local/bin sh
[ -d /opt/btx_jax ] || git clone {source} /opt/btx_jax
cd /opt/btx_jax
[ -x .venv/bin/python ] || uv venv -q --python 3.11 .venv
uv pip install -q --python .venv/bin/python -c requirements.txt -e '.[demo,gcs,report,tpu]'
# A unit of its own: when the machine is taken away, its shutdown sends SIGTERM to the run itself,
# which saves what is whole, while the network is still up. A child of this script would get none.
systemd-run --quiet --unit=btx --wait --collect --pipe --same-dir --setenv=HOME=/root \
  --property=After=network-online.target env {command}
# Process 0 writes the mark; the slice must not go before it has.
until gcloud storage ls {done} > /dev/null 2>&1; do sleep 10; done
gcloud compute tpus queued-resources delete {name} --zone={zone}{project} --force --quiet --async
"""


class QueuedResources:
    def __init__(self, place: Place):
        if not (place.zone and place.source):
            raise UserError(
                "--backend=queued-resources needs --zone and --source (the git URL that machines"
                " install from)"
            )
        self.place = place

    def files(self, job: Job) -> dict[str, str]:
        return {
            f"{job.name}.startup.sh": self._startup(job),
            f"{job.name}.sh": shlex.join(self._create(job, f"{job.name}.startup.sh")) + "\n",
        }

    def submit(self, job: Job) -> None:
        """Create the request unless one of that name exists."""
        if self._state(job):
            self.keep(job)
            return
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "startup.sh"
            script.write_text(self._startup(job), encoding="utf-8")
            require(ask(self._create(job, str(script))))

    def keep(self, job: Job) -> None:
        """Delete a request whose machines were preempted, so that the next call creates it anew."""
        state = self._state(job)
        if not state:
            self.submit(job)
        elif state in LOST:
            log.info("%s: %s; requesting it again", job.name, state)
            delete = [
                "gcloud",
                "compute",
                "tpus",
                "queued-resources",
                "delete",
                self.place.job_name(job.name),
                *self._where(),
            ]
            require(ask([*delete, "--force", "--quiet"]))

    def _state(self, job: Job) -> str:
        """The state of a job's request; "" when there is none."""
        describe = [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "describe",
            self.place.job_name(job.name),
            *self._where(),
        ]
        found = ask([*describe, "--format=value(state.state)"])
        if found.returncode and "NOT_FOUND" not in found.stderr:
            require(found)
        return "" if found.returncode else found.stdout.strip()

    def _where(self) -> list[str]:
        return [
            f"--zone={self.place.zone}",
            *([f"--project={self.place.project}"] if self.place.project else []),
        ]

    def _create(self, job: Job, script: str) -> list[str]:
        if not job.topology:
            raise UserError(
                f"--backend=queued-resources: stage {job.name} has no TPU topology; set one"
                " with --slice or --topology"
            )
        topology, name = parse_topology(job.topology), self.place.job_name(job.name)
        return [
            "gcloud", "compute", "tpus", "queued-resources", "create", name, *self._where(),
            f"--node-id={name}",
            f"--type={topology.kind.replace('v5e', 'v5litepod')}", f"--topology={topology.grid}",
            f"--runtime-version={RUNTIMES[topology.kind]}",
            f"--metadata-from-file=startup-script={script}",
            *(["--spot"] if self.place.spot else []),
        ]  # fmt: skip

    def _startup(self, job: Job) -> str:
        place = self.place
        return STARTUP.format(
            source=shlex.quote(place.source),
            command=place.shell((".venv/bin/python", *job.command[1:])),
            done=shlex.quote(f"{job.workdir}/{job.name}/{DONE}"),
            name=place.job_name(job.name),
            zone=place.zone,
            project=f" --project={place.project}" if place.project else "",
        )
