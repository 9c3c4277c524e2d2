"""Shared by the cloud backends: where cloud jobs run and keep their files, and how an engine's tool
is called."""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from btx_jax.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where cloud jobs run.

    bucket: gs://NAME, or a directory in it; text and checkpoints are read from its data/, and runs
    written to its runs/. source: the git URL from which machines install btx_jax. run: a name for
    this pipeline's jobs. spot: whether machines are preemptible.
    """

    bucket: str
    run: str
    source: str = ""
    zone: str = ""
    project: str = ""
    image: str = ""
    queue: str = ""
    spot: bool = False

    def __post_init__(self):
        if not self.bucket.startswith("gs://"):
            raise UserError(
                f"--bucket={self.bucket!r}: must be gs://NAME; checkpoints and completion"
                " markers are stored there"
            )

    def path(self, *names: str) -> str:
        return "/".join((self.bucket.rstrip("/"), *names))

    def shell(self, command: Sequence[str]) -> str:
        """The command with its environment, as one line of shell."""
        return f"BTX_DATA_DIR={shlex.quote(self.path('data'))} {shlex.join(command)}"

    def job_name(self, stage: str) -> str:
        """A job's name in lower case with dashes, which every engine accepts."""
        return f"{self.run}-{stage}".lower().replace("_", "-")


def ask(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess:
    """Run an engine's tool. Raises UserError when it is not installed."""
    try:
        return subprocess.run(command, input=text, text=True, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not installed; install it as in docs/on-tpus.md, or use --dry-run,"
            " which needs nothing"
        ) from None


def require(result: subprocess.CompletedProcess) -> None:
    """Raise UserError with the tool's own message if it failed."""
    if result.returncode:
        words = " ".join((result.stderr or result.stdout).split())[-500:]
        raise UserError(f"{result.args[0]} failed with exit status {result.returncode}: {words}")
