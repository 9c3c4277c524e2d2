"""Names on the Hugging Face Hub, as users write them and as they appear in paths of its cache."""

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from btx_jax import environment
from btx_jax.errors import UserError, one_line

PROTOCOL = "hf://"
# A repository, a revision and a folder; none begins with a dot.
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.%/-]+?)?(/\w[\w.-]*)*", re.ASCII)
_SNAPSHOT = re.compile(
    r"/(?P<type>model|dataset)s--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<path>(/.*)?)$"
)


class Name(NamedTuple):
    """A name on the Hub. type: model or dataset. revision: a branch, tag or commit, "" for the main
    branch. path: of a folder in it, or of files."""

    type: str
    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        folder = f"/{self.path}" if self.path else ""
        return f"{'datasets/' if self.type == 'dataset' else ''}{self.repository}{folder}"

    @property
    def repository(self) -> str:
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}"


def named(text: str, key: str) -> Name | None:
    """The name on the Hub that a text stands for; None for a path: anything that exists locally, or
    whose folder does. Raises UserError for hf:// without a valid name."""
    if not text.startswith(PROTOCOL):
        if _NAME.fullmatch(text) is None or os.path.lexists(text):
            return None
        if os.path.isdir(text.partition("/")[0]):
            return None
    environment.require("hub", f"{key}: {text} (not a local path, so taken as a name on the Hub)")
    from huggingface_hub.utils import parse_hf_uri

    body = text.removeprefix(PROTOCOL)
    typed = body.startswith(("datasets/", "models/")) and text.startswith(PROTOCOL)
    try:
        found = parse_hf_uri(PROTOCOL + (body if typed else f"models/{body}"))
    except ValueError as error:
        if not text.startswith(PROTOCOL):
            return None
        raise UserError(f"{key}: {one_line(error)}") from error
    return Name(str(found.type), found.id, found.revision or "", found.path_in_repo.strip("/"))


def may_be_named(text: str) -> bool:
    """Whether this could be a name on the Hub."""
    return _NAME.fullmatch(text) is not None


def matches(path: str, pattern: str) -> bool:
    """Match a path as a shell would: * stays within a folder, ** spans any number of them."""

    def match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
        if not patterns:
            return not parts
        if patterns[0] == "**":
            return any(match(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
        return (
            bool(parts)
            and fnmatch.fnmatchcase(parts[0], patterns[0])
            and match(parts[1:], patterns[1:])
        )

    return match(path.split("/"), pattern.split("/"))


def origin(path: Path | str) -> Name | None:
    """For a path inside a snapshot of the Hub's cache, its name on the Hub with the commit as
    revision; None for other paths."""
    match = _SNAPSHOT.search(str(path))
    if match is None:
        return None
    repo = match["repo"].replace("--", "/", 1)
    return Name(match["type"], repo, match["commit"], match["path"].strip("/"))


def title(path: Path) -> str:
    """A model directory's name for display: that on the Hub, if it comes from there."""
    found = origin(path)
    return str(found._replace(revision="")) if found else path.name
