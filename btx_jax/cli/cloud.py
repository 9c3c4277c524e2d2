"""The commands that use other machines: submit and push."""

import logging
import sys
from typing import Any

import rich_click as click

from btx_jax import terminal
from btx_jax.cli.configs import CONFIG, CONFIG_TOLD, WithOverrides
from btx_jax.cli.parts import CLOUD, WHERE, command, text
from btx_jax.errors import UserError

MACHINES = "Machines in the cloud"


@command(
    panel=CLOUD,
    cls=WithOverrides,
    examples="""
btx submit --pipeline=btx:tiny --backend=local --parallel=3
btx submit --pipeline=btx --backend=gke --bucket=gs://NAME --image=IMAGE \\
    --topology=v5p:2x2x2 --slice=finetune=v5p:2x2x4 --dry-run
""",
)
@click.option("--pipeline", type=CONFIG, metavar="CONFIG", required=True, help=CONFIG_TOLD)
@click.option(
    "--backend",
    type=click.Choice(["local", "queued-resources", "gke", "skypilot"]),
    required=True,
    help="processes on this machine, TPU VMs, GKE (JobSet, Kueue), or SkyPilot's managed jobs",
)
@text(
    "--workdir",
    type=WHERE,
    metavar="DIR",
    help="directory for everything the run writes; by default runs/RUN, in the cloud"
    " gs://BUCKET/runs/RUN",
)
@click.option("--run", metavar="NAME", default="btx", help="name for this pipeline's jobs")
@click.option("--dry-run", is_flag=True, help="write the backend requests without sending them")
@text("--out", type=WHERE, metavar="DIR", help="with --dry-run: directory to write the requests to")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    metavar="N",
    default=2,
    help="with --backend=local: number of concurrent jobs",
)
@text(
    "--topology",
    panel=MACHINES,
    metavar="KIND:GRID",
    help="TPU slice for every job, such as v5p:2x2x2; by default machines without TPUs",
)
@click.option(
    "--slice",
    "slices",
    panel=MACHINES,
    multiple=True,
    metavar="STAGE=TOPOLOGY",
    help="different slice for one stage; may be repeated",
)
@text(
    "--bucket", panel=MACHINES, metavar="gs://NAME", help="bucket that holds the text and the runs"
)
@text("--source", panel=MACHINES, metavar="URL", help="git URL from which machines install btx_jax")
@click.option(
    "--image",
    panel=MACHINES,
    metavar="IMAGE",
    default="btx-jax:latest",
    help="gke: container image with btx_jax installed (launch/Dockerfile)",
)
@text("--queue", panel=MACHINES, metavar="NAME", help="gke: Kueue's local queue")
@text("--zone", panel=MACHINES, metavar="ZONE", help="Google Cloud zone")
@text("--project", panel=MACHINES, metavar="ID", help="Google Cloud project")
@click.option(
    "--spot",
    panel=MACHINES,
    is_flag=True,
    help="use preemptible machines, at a fraction of the price",
)
def submit(
    pipeline: str,
    overrides: list[str],
    backend: str,
    workdir: str,
    run: str,
    dry_run: bool,
    out: str,
    parallel: int,
    topology: str,
    slices: tuple[str, ...],
    **place: Any,
) -> None:
    """Run a pipeline with every stage as a job of its own.

    Branches train concurrently on separate machines. After any interruption, run the command again:
    finished stages are skipped, running ones are left alone. docs/on-tpus.md leads from a new
    Google Cloud project to a finished mixture.
    """
    from btx_jax.backends.cloud import Place
    from btx_jax.backends.submit import in_the_cloud, on_this_machine

    terminal.log_to(sys.stderr, logging.INFO)
    if wrong := [word for word in slices if "=" not in word]:
        raise UserError(f"--slice={wrong[0]}: must be STAGE=TOPOLOGY")
    if backend == "local":
        where = workdir or f"runs/{run}"
        on_this_machine(pipeline, overrides, where, parallel, dry_run, out)
        return
    topologies = {"": topology} | dict(word.split("=", 1) for word in slices)
    made = Place(run=run, **place)
    in_the_cloud(backend, made, pipeline, overrides, workdir, topologies, dry_run, out)


@command(panel=CLOUD, examples="btx push mixture org/my-mixture --private")
@click.argument(
    "directory",
    metavar="DIR",
    type=WHERE,
    help="directory of an export, mixture, merged model or peft adapter",
)
@click.argument("repository", metavar="ORG/NAME", help="created if missing")
@click.option(
    "--private", is_flag=True, help="make the repository visible only to you and your organisation"
)
@text("--revision", metavar="BRANCH", help="branch, created if missing; by default main")
@text("--message", metavar="TEXT", help="commit message")
def push(directory: str, repository: str, private: bool, revision: str, message: str) -> None:
    """Upload a Hugging Face directory to a repository on the Hub."""
    from btx_jax.commands.push import push as upload

    told = upload(directory, repository, is_private=private, revision=revision, message=message)
    terminal.say(told)
