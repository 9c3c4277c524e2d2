"""The notebook's installation leaves Colab's own packages unchanged: those already imported could
not be replaced without a restart, and its TPU needs the preinstalled jax.

Colab's image of January 2026 is published, with jax 0.7.2, which btx_jax refuses. Later ones, on
Python 3.13 since August 2026, are not: their JAX stack is assumed to lie between the oldest and the
newest of our ranges, and both ends are tested, with everything else as in January.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.source_tree import copy_source

pytestmark = pytest.mark.cli

STACKS = {
    "oldest": (
        "jax==0.8.2 jaxlib==0.8.2 libtpu==0.0.30 flax==0.11.2 optax==0.2.6 chex==0.1.90"
        " orbax-checkpoint==0.11.31 tensorstore==0.1.80 grain==0.2.15"
    ),
    "newest": (
        "jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1 flax==0.12.12 optax==0.2.8 chex==0.1.92"
        " orbax-checkpoint==0.12.8 tensorstore==0.1.86 grain==0.2.18"
    ),
}
EXTRAS = "demo,report"
NO_INDEX = ("NewConnectionError", "NameResolutionError", "ConnectTimeout")


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_no_package_of_colab_is_replaced(tmp_path, stack):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "colab"], check=True)
    there = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "colab")}))
    lines = (ROOT / "tests" / "colab_image.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")] + STACKS[stack].split()
    installed = {
        canonicalize_name(name): version for name, version in (p.split("==") for p in pins)
    }
    for name, version in installed.items():  # all that pip reads of an installed package
        folder = there / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (folder / "RECORD").touch()
    source = tmp_path / "source"
    source.mkdir()
    copy_source(source)
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "colab" / "bin" / "python"]
    done = subprocess.run(
        [*pip, "install", "--dry-run", "--retries=1", f"--report={report}", f"{source}[{EXTRAS}]"],
        capture_output=True,
        text=True,
    )
    if any(word in done.stdout + done.stderr for word in NO_INDEX):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    added = {
        canonicalize_name(found["metadata"]["name"]): found["metadata"]["version"]
        for found in json.loads(report.read_text())["install"]
    }
    assert "btx-jax" in added
    assert not added.keys() & installed.keys(), "pip would replace what Colab has"


def test_the_notebook_asks_pip_for_what_is_tried_here():
    notebook = nbformat.read(ROOT / "launch" / "colab" / "btx_demo.ipynb", as_version=4)
    (cell,) = (cell.source for cell in notebook.cells if '"pip"' in cell.source)
    assert f'"install", "-q", "-e", f"{{checkout}}[{EXTRAS}]"' in cell
