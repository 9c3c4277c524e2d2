"""Report all problems of a stored model at once."""

from collections.abc import Sequence
from pathlib import Path

from btx_jax.errors import UserError

SHOWN = 12  # problems listed in full before "and n more"


def raise_problems(directory: Path, problems: Sequence[str]) -> None:
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(f"{directory}: {count}{'; '.join(problems[:SHOWN])}{rest}")


def listed(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
