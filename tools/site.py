"""mkdocs hook: pages of the site that lie outside docs/, where GitHub and Python packages look for
them. README.md is its first page; links between them and docs/ are rewritten."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "LICENSE"}


def on_files(files: Files, config: Any) -> Files:
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead from docs/ to files beside it."""
    for source, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def as_page(text: str) -> str:
    """A file of the root as a page of docs/."""
    for source, page in OUTSIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")
