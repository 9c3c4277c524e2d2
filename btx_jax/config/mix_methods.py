"""How feed-forwards become experts: the methods by name, for recipes and for the mix stage alike,
and the arithmetic of their cuts."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from btx_jax.errors import ConfigError


class Piece(NamedTuple):
    """One of `pieces` equal parts, along d_ff, of a source's feed-forward."""

    source: int
    number: int
    pieces: int


class Method(NamedTuple):
    """How feed-forwards become experts. pieces: (sources, chunks) -> how many pieces each
    feed-forward is cut into. per_expert: (sources, chunks) -> how many pieces, joined, make an
    expert. place: (expert, n, pieces) -> source and number of the expert's n-th piece."""

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
AVERAGE = "average"  # of the mix stage: no experts, one dense model


class Cut(NamedTuple):
    """Feed-forwards cut into experts. experts: how many there are. d_ff: of each. pieces: how many
    each source's feed-forward is cut into."""

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
    """How many experts there are."""
    how = METHODS[method]
    return sources * how.pieces(sources, chunks) // how.per_expert(sources, chunks)


def cut(method: str, sources: int, chunks: int, d_ff: int) -> Cut:
    """How the feed-forwards of that many sources are cut. chunks: of `split`. Raises ConfigError
    when d_ff cannot be cut."""
    how = METHODS[method]
    pieces, joined = how.pieces(sources, chunks), how.per_expert(sources, chunks)
    if d_ff % pieces:
        raise ConfigError(f"method={method!r}: d_ff={d_ff} is not divisible into {pieces} chunks")
    experts = count(method, sources, chunks)
    return Cut(method, experts, d_ff // pieces * joined, pieces, joined)


def owners(method: str, sources: int, chunks: int) -> list[int]:
    """The source of each expert; [] where experts are made of several sources, or there
    are none."""
    if method not in METHODS or METHODS[method].per_expert(sources, chunks) > 1:
        return []
    made = cut(method, sources, chunks, METHODS[method].pieces(sources, chunks))
    return [made.made_of(expert)[0].source for expert in range(made.experts)]
