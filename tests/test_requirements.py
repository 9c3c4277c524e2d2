"""An installation without the tests' own tools must contain everything that the package imports;
where tests run, those tools would hide a gap. Pinned packages must be exactly those required."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Extras whose packages are imported only where needed, and reported when missing.
IMPORTED = ("demo", "gcs", "hub", "int8", "lm-eval", "mlflow", "report", "wandb")
PINNED = ("dev", "tpu", *IMPORTED)
PYTHONS = ("3.11", "3.12", "3.13")


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("folder", ["btx_jax", "configs", "launch"])
def test_whatever_is_imported_is_required(folder):
    required = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in IMPORTED))
    known = packages_distributions()
    own = {"btx_jax", "configs", "launch", *sys.stdlib_module_names}
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            top = name.partition(".")[0]
            if top not in own:
                assert {canonicalize_name(name) for name in known.get(top, [])} & required, (
                    f"{file.relative_to(ROOT)} imports {top}: not in pyproject.toml"
                )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_is_exact_and_within_the_range_that_is_asked_for(python):
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            if pin.marker is None or pin.marker.evaluate({"python_full_version": f"{python}.0"}):
                assert canonicalize_name(pin.name) not in pins, line
                pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    asked = PROJECT["dependencies"] + [text for extra in PINNED for text in EXTRAS[extra]]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != "btx-jax":
            assert requirement.specifier.contains(pins[name]), (
                f"{requirement}, but requirements.txt pins {pins[name]}: make pins"
            )


def test_every_python_that_is_named_is_one_that_the_pins_are_for():
    said = [text for text in PROJECT["classifiers"] if re.search(r":: 3[.]\d+$", text)]
    assert [text.rpartition(" ")[2] for text in said] == list(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
