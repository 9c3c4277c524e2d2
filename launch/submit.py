"""Run a pipeline with every stage as a job of its own, so that branches train at the same time and
apart.

    python launch/submit.py --pipeline=configs/btx.py:tiny --backend=local --workdir=runs/btx
    --parallel=3 python launch/submit.py --pipeline=configs/btx.py --backend=gke --bucket=gs://NAME
    --image=IMAGE --topology=v5p:2x2x2 \\ --slice=finetune=v5p:2x2x4 --dry-run

Arguments that begin with --config. go to every stage. Start it again after any interruption: what
has finished is skipped, what runs is left alone. --dry-run writes down, or with --out=DIR into
files, exactly what would be handed to the engine.
"""

import argparse
import logging
import sys
from pathlib import Path

from btx_jax.backends.cloud import MOUNT, Place, ask
from btx_jax.backends.gke import Gke
from btx_jax.backends.jobs import Backend, Job, drive, jobs_of
from btx_jax.backends.local import Local
from btx_jax.backends.queued_resources import QueuedResources
from btx_jax.backends.skypilot import SkyPilot
from btx_jax.command_line import Parser, told_in_one_line
from btx_jax.errors import UserError
from btx_jax.paths import expand

CLOUD = {"queued-resources": QueuedResources, "gke": Gke, "skypilot": SkyPilot}


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--pipeline", required=True, help="config file of a pipeline, as for btx_jax.launch"
    )
    p.add_argument("--backend", required=True, choices=["local", *CLOUD])
    p.add_argument(
        "--workdir",
        default="",
        help=f"where the runs go; on cloud machines under {MOUNT}/runs (default: named by --run)",
    )
    p.add_argument("--run", default="btx", help="a name for this pipeline's jobs")
    p.add_argument("--parallel", type=int, default=2, help="local: jobs at a time")
    p.add_argument(
        "--topology",
        default="",
        help="TPU slice of every job, such as v5p:2x2x2; none: machines without TPUs",
    )
    p.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="STAGE=TOPOLOGY",
        help="another slice for one stage",
    )
    p.add_argument("--bucket", default="", help="gs://NAME, mounted on every machine")
    p.add_argument("--source", default="", help="git URL of btx_jax for TPU VMs")
    p.add_argument(
        "--image",
        default="btx-jax:latest",
        help="gke: container image with btx_jax installed (launch/Dockerfile)",
    )
    p.add_argument("--queue", default="", help="gke: Kueue's local queue")
    p.add_argument("--zone", default="")
    p.add_argument("--project", default="")
    p.add_argument(
        "--spot",
        action="store_true",
        help="machines that may be taken away, at a fraction of the price",
    )
    p.add_argument("--dry-run", action="store_true")
    p.add_argument("--out", default="", help="with --dry-run: write the files here")
    return p


def show(jobs: list[Job], backend: Backend, out: str) -> None:
    for job in jobs:
        for name, text in backend.files(job).items():
            if out:
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / name).write_text(text, encoding="utf-8")
            else:
                print(f"# ---- {name}" + (f" (after {', '.join(job.needs)})" if job.needs else ""))
                print(text)


def main() -> None:
    args, overrides = parser().parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with told_in_one_line():
        if wrong := [word for word in overrides if not word.startswith("--config.")]:
            raise UserError(
                f"unknown argument {wrong[0]!r}; overrides look like --config.rng_seed=1"
            )
        if wrong := [word for word in args.slice if "=" not in word]:
            raise UserError(f"--slice={wrong[0]}: must be STAGE=TOPOLOGY")
        if args.parallel < 1:
            raise UserError(f"--parallel={args.parallel}: must be at least 1")
        topologies = {"": args.topology} | dict(word.split("=", 1) for word in args.slice)
        if args.backend == "local":
            workdir = Path(expand(args.workdir or f"runs/{args.run}", "--workdir")).resolve()
            jobs = jobs_of(args.pipeline, str(workdir), overrides, python=sys.executable)
            local = Local(workdir / "logs", args.parallel)
            if args.dry_run:
                show(jobs, local, args.out)
                return
            local.run(jobs, lambda job: (workdir / job.name / "done.json").exists())
            whole = Job(
                "pipeline",
                (),
                tuple(word for word in jobs[0].command if not word.startswith("--only=")),
                str(workdir),
            )
            local.run([whole], lambda job: False)  # all is there: writes the pipeline's own files
            return
        place = Place(
            args.bucket,
            args.run,
            args.source,
            args.zone,
            args.project,
            args.image,
            args.queue,
            args.spot,
        )
        backend = CLOUD[args.backend](place)
        workdir = args.workdir or f"{MOUNT}/runs/{args.run}"
        jobs = jobs_of(args.pipeline, workdir, overrides, topologies, cache=f"{MOUNT}/cache")
        if args.dry_run:
            show(jobs, backend, args.out)
            return
        inside = place.bucket.rstrip("/") + workdir.removeprefix(MOUNT)
        drive(
            jobs,
            backend,
            lambda job: (
                ask(["gcloud", "storage", "ls", f"{inside}/{job.name}/done.json"]).returncode == 0
            ),
        )


if __name__ == "__main__":
    main()
