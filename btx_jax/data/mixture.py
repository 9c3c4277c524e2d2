"""Prepared domains -> batches, with Grain: weighted mixing, shuffling, sharding by host, prefetch and exact resume."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from btx_jax.data.prepare import PreparedDomain
from btx_jax.errors import UserError

Row = dict[str, np.ndarray]
PREFETCH = 4  # batches of rows read ahead
ENDLESS = 2**62  # rows; grain counts in floating point, and batches of one row of a longer set in more than an index can hold


def training_batches(
    domains: Sequence[PreparedDomain], batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches {tokens, segments: [batch_size / process_count, sequence + 1]} of this process's rows.

    A row comes from a domain, and there from a source, in proportion to the weights (normalised); each source is reshuffled every
    epoch. The batches are a function of (domains, batch_size, seed) alone: all processes together see the same rows whatever
    their number. `get_state` and `set_state` of the iterator resume it exactly.

    Raises UserError when batch_size is not divisible by process_count.
    """
    if batch_size % process_count:
        raise UserError(f"config.train.batch_size={batch_size}: not divisible by the {process_count} processes")
    weighted = [
        (source, domain.weight * source.weight / sum(s.weight for s in domain.sources)) for domain in domains for source in domain.sources
    ]
    # A dataset's own seed decides its order: equal sources in different places must not move in step.
    parts = [
        grain.MapDataset.source(source.open("train")).seed(seed + 7919 * i).shuffle().repeat() for i, (source, _) in enumerate(weighted)
    ]
    rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [weight for _, weight in weighted])
    rows = rows[process_index:ENDLESS:process_count].map(lambda row: {name: row[name] for name in ("tokens", "segments")})
    batches = rows.batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))


def heldout_rows(domain: PreparedDomain, limit: int = 0) -> Row:
    """The held-out rows of a domain in order, at most `limit` (0: all): tokens, segments [rows, sequence + 1], bytes [rows]."""
    return _stacked(domain, "heldout", limit)


def first_rows(domain: PreparedDomain, limit: int) -> Row:
    """The first training rows of each of a domain's sources, `limit` in all."""
    return _stacked(domain, "train", limit, each=-(-limit // len(domain.sources)))


def _stacked(domain: PreparedDomain, split: str, limit: int, each: int = 0) -> Row:
    rows: list[Row] = []
    for source in domain.sources:
        opened: Any = source.open(split) if source.rows(split) else ()
        wanted = min(len(opened), each or len(opened))
        rows += [opened[i] for i in range(min(wanted, limit - len(rows)) if limit else wanted)]
    if not rows:
        empty = np.zeros((0, 2), np.int32)
        return {"tokens": empty, "segments": empty, "bytes": np.zeros(0, np.int32)}
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
