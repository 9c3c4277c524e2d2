"""TPU slices by name, such as v5p:2x2x4."""

import re

from btx_jax.errors import UserError

# From Cloud TPU's page on each kind, 2026. v5e and v6e slices are two-dimensional and exist only in
# these shapes.
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
LARGEST_PLANE = 256  # chips


def parse_grid(topology: str) -> tuple[str, tuple[int, ...]]:
    """Parse a slice name: v5p:2x2x4 -> ("v5p", (2, 2, 4)). Raises UserError for a slice that does
    not exist."""
    match = re.fullmatch(rf"({'|'.join(DIMENSIONS)}):([1-9]\d*(?:x[1-9]\d*)+)", topology)
    if not match:
        raise UserError(
            f"{topology!r} is not a TPU topology; for example v5p:2x2x4 or v5e:4x4 (kinds:"
            f" {', '.join(DIMENSIONS)})"
        )
    kind, grid = match.groups()
    sides = tuple(map(int, grid.split("x")))
    if DIMENSIONS[kind] == 2:
        if grid not in PLANES:
            raise UserError(
                f"topology {topology}: {kind} slices have two dimensions: {', '.join(PLANES)}"
            )
    elif len(sides) != 3 or not _is_block(sides):
        raise UserError(
            f"topology {topology}: {kind} slices have three dimensions, of 1, 2 or 4 chips, or all"
            " multiples of 4, such as 2x2x1, 2x2x4, 4x4x8"
        )
    return kind, sides


def _is_block(sides: tuple[int, ...]) -> bool:
    return all(side in (1, 2, 4) for side in sides) or all(side % 4 == 0 for side in sides)
