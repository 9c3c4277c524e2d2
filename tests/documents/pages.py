"""The commands and files in README.md and docs/."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4,}\S.*\n)+", re.MULTILINE)  # an indented code block
PROGRAMS = ("btx ", "python ", "make ", "pip ")


class Command(NamedTuple):
    """A command. text: on one line, without comments, with single spaces."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands() -> list[Command]:
    """All commands in page order; each once per page."""
    found = (
        Command(page.name, text)
        for page in PAGES
        for block in _shell(page.read_text())
        for text in _split(block)
    )
    return list(dict.fromkeys(found))


def languages() -> Iterator[tuple[str, str]]:
    """Yield (page, language) of every fence; "" for none."""
    for page in PAGES:
        for language, _ in FENCE.findall(page.read_text()):
            yield page.name, language


def files(page: str) -> dict[str, str]:
    """File -> text of the files that a page tells readers to write. Such a block begins with `#
    NAME`."""
    (path,) = (path for path in PAGES if path.name == page)
    found = {}
    for _, text in FENCE.findall(path.read_text()):
        if name := re.match(r"# ([\w.]+\.(?:yml|py))\b", text):
            found[name[1]] = text
    return found


def _shell(text: str) -> Iterator[str]:
    for language, block in FENCE.findall(text):
        if language == "bash":
            yield block
    for block in INDENTED.findall(FENCE.sub("", text)):
        lines = [line.strip() for line in block.splitlines()]
        if lines[0].startswith(PROGRAMS):
            yield "\n".join(lines)


def _split(block: str) -> Iterator[str]:
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        line = re.sub(r"(^|\s)\s*# .*", "", line)
        for text in line.split(" && "):
            text = " ".join(text.split())
            if text and not re.match(r"for .* do$|done$", text):
                yield text
