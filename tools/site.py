"""mkdocs hook for pages outside docs/, where GitHub and Python packages expect them. README.md
becomes the first page; links between these pages and docs/ are rewritten."""

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
    """Rewrite links from docs/ to files outside it."""
    for source, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def as_page(text: str) -> str:
    """A file of the root directory as a page of docs/."""
    for source, page in OUTSIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")
