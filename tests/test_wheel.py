"""The wheel, built from the source distribution and installed in an empty directory without a
checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.source_tree import copy_source

pytestmark = pytest.mark.cli

EVERY_MODULE = """
import importlib, pathlib, pkgutil, sys, btx_jax
root = pathlib.Path(btx_jax.__file__).parent
assert root.is_relative_to(sys.prefix), root
names = [module.name for module in pkgutil.walk_packages(btx_jax.__path__, "btx_jax.")]
assert len(names) > 100
for name in names:
    file = pathlib.Path(importlib.import_module(name).__file__)
    assert file.is_relative_to(root), file
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with both distributions."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    copy_source(source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # setuptools would warn
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "warning" not in told.lower() and "deprecated" not in told.lower(), told
    return built


@pytest.fixture(scope="module")
def place(built, tmp_path_factory):
    """An environment with the packages of this one, and btx_jax only from the wheel."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    there = sysconfig.get_path("purelib", vars={"base": str(place)})
    (Path(there) / "these.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet"]
    wheel = next(built.glob("*.whl"))
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return place


@pytest.fixture
def run(place, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program, *arguments):
        done = subprocess.run(
            [place / "bin" / program, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_both_distributions_hold_every_file_of_the_package_and_say_what_they_are(built):
    files = [file for file in (ROOT / "btx_jax").rglob("*.*") if file.suffix != ".pyc"]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        folder = next(name for name in held if name.endswith("/METADATA")).removesuffix("METADATA")
        about = Parser().parsestr(wheel.read(folder + "METADATA").decode())
    assert {name for name in held if not name.startswith(folder)} == {
        str(file.relative_to(ROOT)) for file in files
    }
    assert f"{folder}licenses/LICENSE" in held
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    for field in ("Summary", "Keywords", "Project-URL", "Requires-Python", "Author"):
        assert about[field], field
    assert "report" in about.get_all("Provides-Extra")
    assert next(built.glob("*.tar.gz")).stat().st_size > 100_000


@pytest.mark.slow
def test_every_module_is_imported_from_the_wheel(run):
    run("python", "-c", EVERY_MODULE)


def test_the_command_works_in_an_empty_folder(run, tmp_path):
    assert "digest" in run("btx", "--help")
    golden = ROOT / "tests" / "checkpoints" / "golden" / "llama"
    shutil.copytree(golden, tmp_path / "model")
    there = run("btx", "digest", "model")
    here = [sys.executable, "-m", "btx_jax", "digest", golden]
    assert there == subprocess.run(here, cwd=ROOT, capture_output=True, text=True).stdout
