"""Parsing of paths as users write them."""

import os
import re
from pathlib import Path

from btx_jax import buckets
from btx_jax.errors import UserError


def to_path(path: str, key: str) -> Path:
    """Parse a path as a user writes it: expanded by `expand`, or the URL of a bucket. Raises
    UserError, naming the key, for anything else."""
    expanded = expand(path, key)
    if re.match(r"(gs|s3):(?!//)", expanded) and not os.path.lexists(expanded):
        raise UserError(f"{key}={path!r}: no such path; a bucket's begins with {expanded[:2]}://")
    if not buckets.is_url(expanded):
        return Path(expanded)
    if misread := re.search(r"[][*?#%]", expanded):
        raise UserError(
            f"{key}={path!r}: {misread[0]!r} has a special meaning in bucket libraries; choose"
            " a name without it"
        )
    return buckets.at(expanded, key)


def expand(path: str, key: str) -> str:
    """Expand `~` and `$NAME` as a shell does. Raises UserError for an unset variable."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset and not os.path.lexists(expanded):
        raise UserError(f"{key}={path!r}: the environment variable {unset[1]} is not set")
    return expanded


_BLOB = re.compile(r"/(?:models|datasets|spaces)--[^/]+/blobs/[0-9a-f]{40,64}$")
_SHARED_BLOB = re.compile(r"/blobs/[0-9a-f]{2}/[0-9a-f]{64}$")  # shared by repositories


def refuse_links_out(directory: Path) -> None:
    """Raise UserError for a link in a downloaded directory that leads out of it: its target would
    be read and copied as if it were part of it. Blobs of a Hugging Face cache, to which the files
    of its snapshots and of older downloads link, are permitted."""
    if buckets.is_on_bucket(directory):
        return  # buckets have no links
    root = directory.resolve()
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))
            named = os.path.normpath(path.parent.resolve() / os.readlink(path))
            blob = _BLOB.search(str(target)) or (
                _BLOB.search(named) and _SHARED_BLOB.search(str(target))
            )
            if not target.is_relative_to(root) and not blob:
                raise UserError(
                    f"{path}: a link to {target}, outside the directory; replace it with a copy"
                )
