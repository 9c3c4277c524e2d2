"""The best step so far (`config.checkpoint.best`)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from btx_jax.reporting.metrics import numbers

HELDOUT, LOSS = "heldout", "nats_per_token"


class Best:
    """Finds the best step by a metric in the lines of metrics.jsonl, named as in
    CheckpointConfig."""

    def __init__(self, metric: str, lines: Iterable[Mapping[str, Any]]):
        self.metric = metric
        self._scores: dict[int, float] = {}
        for line in lines:
            self.add(line["step"], line)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the results of a step; ignored if they lack the metric."""
        found = self._value(values)
        if found is not None and math.isfinite(found):
            self._scores[step] = found

    def __call__(self, steps: Iterable[int]) -> int | None:
        """The best of these steps, the first among equals; None if none was evaluated."""
        sign = -1 if self.metric.startswith("tasks/") else 1
        measured = [step for step in steps if step in self._scores]
        return min(measured, key=lambda step: (sign * self._scores[step], step), default=None)

    def of(self, step: int) -> float:
        return self._scores[step]

    def _value(self, values: Mapping[str, Any]) -> float | None:
        if self.metric == HELDOUT:
            losses = [domain[LOSS] for domain in values.get(HELDOUT, {}).values()]
            return sum(losses) / len(losses) if losses else None
        return numbers(values).get(self.metric) if self.metric else None
