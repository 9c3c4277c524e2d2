"""Paths as users write them."""

import os
import re

from btx_jax.errors import UserError


def expand(path: str, key: str) -> str:
    """A path as a shell reads it: with `~` and `$NAME`. Raises UserError for a variable that is not
    set, and for an URL."""
    if scheme := re.match(r"\w+://", path):
        raise UserError(
            f"{key}={path!r}: {scheme[0]} is not read; mount the bucket (Cloud Storage FUSE) and"
            " name the path there"
        )
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset and not os.path.lexists(expanded):
        raise UserError(f"{key}={path!r}: the environment variable {unset[1]} is not set")
    return expanded
