"""The stages: each reads checkpoints and text and writes one directory. Each is idempotent and resumable."""

import importlib
from pathlib import Path

from btx_jax.config import Config


def run(config: Config, workdir: Path, **options: str) -> None:
    """Run config.stage in workdir. A stage that has finished there returns at once. options: of the pipeline stage alone."""
    importlib.import_module(f"btx_jax.stages.{config.stage}").run(config, workdir, **options)
