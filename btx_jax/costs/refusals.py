"""Parse libtpu's out-of-memory errors: main memory of a chip, or vector memory."""

import re
from dataclasses import dataclass

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Each pattern captures (needed, available). Wordings are those of libtpu 0.0.30 to 0.0.50.
_MAIN = (
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm",
    r"HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)",
)
_VECTOR = (
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) vmem",
    r"Scoped allocation with size ([\d.]+[KMGT]?) and limit ([\d.]+[KMGT]?)",
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)",
)


@dataclass(frozen=True)
class Refusal:
    """An out-of-memory error. vector: whether a single operation overflows vector memory (VMEM),
    which neither more chips nor smaller batches cure. needed, limit: bytes, None if not stated."""

    vector: bool
    needed: float | None
    limit: float | None


def read_refusal(message: str) -> Refusal | None:
    """The out-of-memory error in a message; None for any other error."""
    vector = re.search(r"\bvmem\b", message, re.IGNORECASE) is not None
    if not vector and "RESOURCE_EXHAUSTED" not in message and "hbm" not in message.lower():
        return None
    for pattern in _VECTOR if vector else _MAIN:
        if found := re.search(pattern, message):
            return Refusal(vector, _bytes(found[1]), _bytes(found[2]))
    return Refusal(vector, None, None)


def _bytes(text: str) -> float:
    digits = text.rstrip("KMGT")
    return float(digits) * UNITS[text[len(digits) :]]
