"""launch/colab/btx_demo.ipynb executed as a person would: every cell, on a CPU, with fewer
steps."""

import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

pytestmark = pytest.mark.cli


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch):
    steps = {
        "seed": 6,
        "expert_math": 3,
        "expert_code": 3,
        "expert_world": 3,
        "finetune": 3,
        "dense": 3,
    }
    overrides = [
        f"--config.pipeline.{name}.config.train.steps={count}" for name, count in steps.items()
    ]
    overrides += [f"--config.pipeline.{name}.config.train.warmup_steps=1" for name in steps]
    overrides += [f"--config.pipeline.{name}.config.train.eval_every=0" for name in steps]
    overrides.append("--config.pipeline.evaluate.config.evaluate.rows=8")
    monkeypatch.setenv("BTX_DEMO_OVERRIDES", " ".join(overrides))
    monkeypatch.setenv("BTX_DEMO_WORKDIR", str(tmp_path / "demo"))
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "launch" / "colab" / "btx_demo.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "the notebook is kept without outputs"
    )
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "launch" / "colab")}},
    ).execute()
    told = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "btx_untuned" in told
    assert any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert (tmp_path / "demo" / "huggingface" / "model.safetensors").exists()
