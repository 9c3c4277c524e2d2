"""One SkyPilot managed job per stage: `sky jobs launch`, which restarts a preempted spot slice
wherever there is capacity."""

import shlex
import tempfile
from pathlib import Path

import yaml

from btx_jax.backends.cloud import Place, ask, require
from btx_jax.backends.jobs import Job, parse_topology
from btx_jax.errors import UserError

# SkyPilot names slices by TensorCores on v4 and v5p (two per chip), by chips on v5e and v6e.
NAMES = {
    "v4": ("tpu-v4", 2),
    "v5e": ("tpu-v5litepod", 1),
    "v5p": ("tpu-v5p", 2),
    "v6e": ("tpu-v6e", 1),
}
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

SETUP = """[ -d btx_jax ] || git clone {source} btx_jax
cd btx_jax
# The machines' own Python is 3.10; docs/tpu.md was compiled on 3.11.
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$HOME/.local/bin" sh
[ -x .venv/bin/python ] || uv venv -q --python 3.11 .venv
uv pip install -q --python .venv/bin/python -c requirements.txt -e '.[demo,gcs,report,tpu]'
"""


class SkyPilot:
    def __init__(self, place: Place):
        if not place.source:
            raise UserError(
                "--backend=skypilot needs --source (the git URL that machines install from)"
            )
        self.place = place

    def files(self, job: Job) -> dict[str, str]:
        return {f"{job.name}.yaml": yaml.safe_dump(self._task(job), sort_keys=False)}

    def submit(self, job: Job) -> None:
        """Launch the job unless the queue has an unfinished one of the same name."""
        name = self.place.job_name(job.name)
        queue = ask(["sky", "jobs", "queue", "--skip-finished"])
        require(queue)
        if name in queue.stdout.split():
            return
        with tempfile.TemporaryDirectory() as folder:
            for file, text in self.files(job).items():
                (Path(folder) / file).write_text(text, encoding="utf-8")
                require(
                    ask(
                        [
                            "sky",
                            "jobs",
                            "launch",
                            "--name",
                            name,
                            "--yes",
                            "--detach-run",
                            str(Path(folder) / file),
                        ]
                    )
                )

    def keep(self, job: Job) -> None:
        """Do nothing: managed jobs recover by themselves."""

    def _task(self, job: Job) -> dict:
        place = self.place
        resources: dict = {
            "infra": f"gcp/*/{place.zone}" if place.zone else "gcp",
            "use_spot": place.spot,
        }
        if job.topology:
            topology = parse_topology(job.topology)
            name, per_chip = NAMES[topology.kind]
            resources["accelerators"] = f"{name}-{topology.chips * per_chip}"
            resources["accelerator_args"] = {
                "tpu_vm": True,
                "runtime_version": RUNTIMES[topology.kind],
            }
        else:
            resources["cpus"] = "8+"
        return {
            "name": place.job_name(job.name),
            "resources": resources,
            "setup": SETUP.format(source=shlex.quote(place.source)),
            # exec: SIGTERM reaches the run, which saves its last complete step
            "run": f"cd btx_jax\nexec env {place.shell(('.venv/bin/python', *job.command[1:]))}\n",
        }
