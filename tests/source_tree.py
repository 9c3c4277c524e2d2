"""A copy of the sources that a build of the package needs, as building leaves files behind."""

import shutil
from pathlib import Path

from tests.conftest import ROOT


def copy_source(target: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "btx_jax", target / "btx_jax", ignore=ignored)
