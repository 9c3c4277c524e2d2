"""Point a process without any Hub settings at a server of tests.hub_server; and models for it."""

import os
import subprocess
import sys

from huggingface_hub import constants

from btx_jax import hub
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "checkpoints" / "golden"
MIXED = ROOT / "tests" / "mixing" / "golden"


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".npz"
    }


LLAMA, MODEL = files_of(GOLDEN / "llama"), files_of(MIXED / "a")


def point_at(url, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_pins", {})


def environment(server, home, **more):
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more,
    }  # fmt: skip


def run_cli(server, tmp_path, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "btx_jax", *arguments],
        env=environment(server, tmp_path / "home", **more), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
