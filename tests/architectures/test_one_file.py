"""A family is one short file: nothing outside architectures/ mentions its name."""

import re
from pathlib import Path

import pytest

from btx_jax.architectures import families
from btx_jax.architectures.registry import known_families
from tests.conftest import ROOT

PACKAGE = ROOT / "btx_jax"
# Behaviour of other projects that depends on families by name: mergekit-moe's layouts,
# AutoTokenizer's classes.
OTHERS = ("mixing/homes.py", "data/tokenizer_classes.py")
LONGEST = 70


def files():
    return {path.stem: path for path in Path(families.__path__[0]).glob("[a-z]*.py")}


def test_every_family_is_a_file_under_its_name():
    assert files().keys() == known_families().keys()


@pytest.mark.parametrize("kind", known_families())
def test_a_family_is_a_short_declaration(kind):
    text = files()[kind].read_text()
    assert text.count("\n") <= LONGEST, "a declaration has no logic: does the maths have a home?"
    assert not re.search(r"^(if|for|while|class|try)\b", text, re.MULTILINE)


def test_nothing_outside_architectures_names_a_family():
    name = re.compile(rf"""["']({"|".join(known_families())})["']""")
    naming = {
        str(path.relative_to(PACKAGE)): sorted(set(name.findall(path.read_text())))
        for path in PACKAGE.rglob("*.py")
        if "architectures" not in path.parts and name.search(path.read_text())
    }
    assert naming.keys() == set(OTHERS), naming
