"""Methods of merging the parameters that models share: their names, and the settings that each
reads."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from btx_jax.config.schema import HUGE, Range

REGMEAN = "regmean"
COPY = "copy"  # in the mix stage: base's parameters; recipes say `base: copy`
# Merge method -> the settings that it reads.
MERGE_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "mean": (),
    "ties": ("density",),
    "dare": ("density",),
    "task_arithmetic": ("scale",),
    "slerp": ("t",),
    REGMEAN: ("alpha",),
}
READ_BASE = ("ties", "dare", "task_arithmetic")  # these measure changes from a base

Density = Annotated[float, Range(1e-6, 1)]
Scale = Annotated[float, Range(-HUGE, HUGE)]
Arc = Annotated[float, Range(0, 1)]
Alpha = Annotated[float, Range(0, 1)]
TextTokens = Annotated[int, Range(16, 10**9)]


def unread(section: Any, kind: type) -> Iterator[str]:
    """Messages about merge settings that are set but not read by the section's `merge`."""
    for key in dict.fromkeys(key for keys in MERGE_SETTINGS.values() for key in keys):
        readers = [name for name, keys in MERGE_SETTINGS.items() if key in keys]
        value = getattr(section, key)
        if value != getattr(kind, key) and section.merge not in readers:
            yield (
                f"{key}={value}: only used with merge {' and '.join(readers)}; remove it or"
                " set merge"
            )
