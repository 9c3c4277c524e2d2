"""Methods of making experts from feed-forwards, for recipes and the mix stage, and the arithmetic
of splitting feed-forwards into pieces."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from btx_jax.errors import ConfigError


class Piece(NamedTuple):
    """One of `pieces` equal parts, along d_ff, of a source's feed-forward."""

    source: int
    number: int
    pieces: int


class Method(NamedTuple):
    """How feed-forwards become experts. pieces: (sources, chunks) -> number of pieces of each
    feed-forward. per_expert: (sources, chunks) -> number of pieces joined into an expert. place:
    (expert, n, pieces) -> source and number of the expert's n-th piece."""

    pieces: Callable[[int, int], int]
    per_expert: Callable[[int, int], int]
    place: Callable[[int, int, int], tuple[int, int]]


METHODS: Mapping[str, Method] = {
    "btx": Method(
        pieces=lambda sources, chunks: 1,
        per_expert=lambda sources, chunks: 1,
        place=lambda expert, n, pieces: (expert, 0),
    ),
    "split": Method(
        pieces=lambda sources, chunks: chunks,
        per_expert=lambda sources, chunks: 1,
        place=lambda expert, n, pieces: divmod(expert, pieces),
    ),
    "blend": Method(
        pieces=lambda sources, chunks: sources,
        per_expert=lambda sources, chunks: sources,
        place=lambda expert, n, pieces: (n, expert),
    ),
}
AVERAGE = "average"  # in the mix stage: no experts, one dense model


class Cut(NamedTuple):
    """How feed-forwards are split into experts. experts: number of experts. d_ff: hidden units of
    each. pieces: number of pieces that each source's feed-forward is split into. per_expert: number
    of pieces joined into an expert."""

    method: str
    experts: int
    d_ff: int
    pieces: int
    per_expert: int

    def made_of(self, expert: int) -> list[Piece]:
        """The expert's pieces, in order along d_ff."""
        place = METHODS[self.method].place
        return [Piece(*place(expert, n, self.pieces), self.pieces) for n in range(self.per_expert)]


def count(method: str, sources: int, chunks: int) -> int:
    """The number of experts that the method makes from this many sources."""
    how = METHODS[method]
    return sources * how.pieces(sources, chunks) // how.per_expert(sources, chunks)


def cut(method: str, sources: int, chunks: int, d_ff: int) -> Cut:
    """How the feed-forwards of this many sources are split. chunks: used by `split` only. Raises
    ConfigError when d_ff is not divisible."""
    how = METHODS[method]
    pieces, joined = how.pieces(sources, chunks), how.per_expert(sources, chunks)
    if d_ff % pieces:
        raise ConfigError(f"method={method!r}: d_ff={d_ff} is not divisible into {pieces} chunks")
    experts = count(method, sources, chunks)
    return Cut(method, experts, d_ff // pieces * joined, pieces, joined)


def owners(method: str, sources: int, chunks: int) -> list[int]:
    """The source of each expert; [] if experts are made from several sources, or if there are no
    experts."""
    if method not in METHODS or METHODS[method].per_expert(sources, chunks) > 1:
        return []
    made = cut(method, sources, chunks, METHODS[method].pieces(sources, chunks))
    return [made.made_of(expert)[0].source for expert in range(made.experts)]
