"""Batches from prepared domains, with Grain: weighted mixing, shuffling, sharding by host,
prefetching and exact resumption."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from btx_jax.data.prepared import PreparedDomain
from btx_jax.errors import UserError

Row = dict[str, np.ndarray]
PREFETCH = 4  # batches of rows read ahead
ENDLESS = (
    2**62
    # Rows of an endless data set. grain computes lengths in floats: with more rows, in batches of
    # one row, an index would overflow.
)


def training_batches(
    domains: Sequence[PreparedDomain],
    batch_size: int,
    seed: int,
    share: int = 0,
    shares: int = 1,
) -> grain.DatasetIterator:
    """Endless batches {tokens, segments: [batch_size / shares, sequence + 1]} of one share of their
    rows (`hosts.share_of_rows`).

    Rows are drawn from domains, and within them from sources, in proportion to the (normalised)
    weights; each source is reshuffled every epoch. The batches are a function of (domains,
    batch_size, seed) alone: all shares together are the same rows whatever their number. The
    iterator's `get_state` and `set_state` resume it exactly.

    Raises UserError when batch_size is not divisible by shares.
    """
    if batch_size % shares:
        raise UserError(
            f"config.train.batch_size={batch_size}: not divisible by the {shares} processes;"
            " use a multiple"
        )
    weighted = [
        (source, domain.weight * source.weight / sum(s.weight for s in domain.sources))
        for domain in domains
        for source in domain.sources
    ]
    # A data set's own seed determines its order: equal sources in different places must not be read
    # in the same order.
    parts = [
        grain.MapDataset.source(source.open("train")).seed(seed + 7919 * i).shuffle().repeat()
        for i, (source, _) in enumerate(weighted)
    ]
    rows = (
        parts[0]
        if len(parts) == 1
        else grain.MapDataset.mix(parts, [weight for _, weight in weighted])
    )
    rows = rows[share:ENDLESS:shares].map(
        lambda row: {name: row[name] for name in ("tokens", "segments")}
    )
    batches = rows.batch(batch_size // shares)
    return iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))
    )


def heldout_rows(domain: PreparedDomain, limit: int = 0) -> Row:
    """Held-out rows of a domain: tokens, segments [rows, sequence + 1], bytes [rows]. limit:
    maximum number of rows, taken from the beginning of each source in proportion to the sources'
    weights; 0 for all."""
    return _first_rows(domain, "heldout", limit)


def first_rows(domain: PreparedDomain, limit: int) -> Row:
    """The first training rows of a domain, at most `limit`: tokens, segments [rows, sequence + 1],
    bytes [rows]."""
    return _first_rows(domain, "train", limit)


def _first_rows(domain: PreparedDomain, split: str, limit: int) -> Row:
    there = [source.rows(split) for source in domain.sources]
    taken = [0] * len(there) if limit else there
    for _ in range(
        min(limit, sum(there))
    ):  # add the next row of the source furthest below its share
        left = [i for i, count in enumerate(there) if taken[i] < count]
        taken[min(left, key=lambda i: (taken[i] + 1) / domain.sources[i].weight)] += 1
    rows: list[Row] = []
    for source, count in zip(domain.sources, taken, strict=True):
        opened: Any = source.open(split) if count else ()
        rows += [opened[i] for i in range(count)]
    if not rows:
        empty = np.zeros((0, 2), np.int32)
        return {"tokens": empty, "segments": empty, "bytes": np.zeros(0, np.int32)}
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
