"""Pages agree with the code, and their links resolve, on GitHub and on the site."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from btx_jax.cli.program import btx
from btx_jax.presets.registry import PRESETS
from tests.conftest import ROOT
from tests.documents.pages import FENCE, PAGES
from tools import references

LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
README_LENGTH = 8000
OUTSIDE = {
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
}  # paths relative to docs/; tools/site.py puts them on the site


def test_readme_stays_one_page():
    assert len((ROOT / "README.md").read_text()) <= README_LENGTH


def test_references_are_those_of_the_code():
    for page, text in references.pages().items():
        assert page.read_text() == text, "run `python -m tools.references`"


def test_no_cell_of_a_reference_is_empty():
    for page, text in references.pages().items():
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        assert rows
        for row in rows:
            cells = re.split(r"(?<!\\)\|", row)[1:-1]
            assert len(cells) == 4 and all(cell.strip() for cell in cells), f"{page.name}: {row}"


def test_every_preset_and_every_command_is_told():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in PRESETS if f"`{name}`" not in text] == []
    assert [name for name in btx.commands if f"btx {name}" not in text] == []


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, anchor) of links to our own files; a bare anchor links to the page itself."""
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as made by GitHub and mkdocs."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        on_site = path.parent == ROOT / "docs" or path.name in OUTSIDE
        assert path.is_file() and on_site, f"{path}: not there, or not on the site"
        if anchor:
            assert anchor in anchors(path), f"{path.name} has no heading {anchor}"


def test_every_page_is_in_the_navigation():
    # Removes material's own YAML tags.
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    nav = re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"]))
    there = {page.name for page in PAGES} - {"README.md"} | {"index.md", "contributing.md"}
    assert sorted(nav) == sorted(there)
