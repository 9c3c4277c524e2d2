"""An installation without the tests' own tools must hold all that the package imports; where tests
run, those tools would hide a gap."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.conftest import ROOT

EXTRAS = {
    "lm_eval",
    "mlflow",
    "wandb",
}  # imported where the user asks for it, and told when it is missing


def distributions(lines):
    return {
        re.sub(r"[-_.]+", "-", re.split(r"[=<>\[;\s]", line, maxsplit=1)[0]).lower()
        for line in lines
        if line and line[0] not in "#\n"
    }


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("folder", ["btx_jax", "configs", "launch"])
def test_whatever_is_imported_is_required(folder):
    required = distributions((ROOT / "requirements.txt").read_text().splitlines())
    known = packages_distributions()
    own = {"btx_jax", "configs", "launch", *EXTRAS, *sys.stdlib_module_names}
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            top = name.partition(".")[0]
            if top not in own:
                assert distributions(known.get(top, [])) & required, (
                    f"{file.relative_to(ROOT)} imports {top}: not in requirements.txt"
                )
