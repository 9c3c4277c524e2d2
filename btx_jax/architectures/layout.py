"""Map the tensors of a model to those of its files, as the family declares them."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from btx_jax.architectures.family import Family, Tensor
from btx_jax.architectures.tensors import TensorId, slots
from btx_jax.config.model_config import ModelConfig


class Row(NamedTuple):
    """One tensor of a file. tensors: our tensors in it, indexed [1][parts], or [experts][parts] if
    stacked."""

    name: str
    tensors: tuple[tuple[TensorId, ...], ...]
    stacked: bool

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        parts = [slots(model)[part].shape for part in self.tensors[0]]
        rows = (sum(shape[0] for shape in parts), *parts[0][1:])
        return (len(self.tensors), *rows) if self.stacked else rows

    def joined(self, read: Callable[[TensorId], np.ndarray]) -> np.ndarray:
        """The file's tensor, assembled from our tensors as `read` returns them."""
        held = [
            read(parts[0]) if len(parts) == 1 else np.concatenate([read(part) for part in parts])
            for parts in self.tensors
        ]
        return np.stack(held) if self.stacked else held[0]


@functools.lru_cache(maxsize=16)
def rows(family: Family, model: ModelConfig) -> tuple[Row, ...]:
    """The tensors of the model's files, ordered so that each can be completed as early as possible.
    Raises ValueError unless every tensor of the model is in exactly one."""
    found = _rows(family.tensors, model)
    order = {part: number for number, part in enumerate(slots(model))}
    held = [part for row in found for parts in row.tensors for part in parts]
    if len(held) > len(set(held)):
        twice = {str(part) for part, times in Counter(held).items() if times > 1}
        raise ValueError(f"{family.model_type}: declared twice: {', '.join(sorted(twice))}")
    if missing := order.keys() - set(held):
        names = ", ".join(sorted(map(str, missing)))
        raise ValueError(f"{family.model_type}: not declared: {names}")
    return tuple(
        sorted(found, key=lambda row: max(order[p] for parts in row.tensors for p in parts))
    )


@functools.lru_cache(maxsize=16)
def other_rows(family: Family, model: ModelConfig) -> tuple[Row, ...]:
    """Like `rows`, but under the family's alternative names."""
    return tuple(_rows(family.also, model))


def constants(family: Family, model: ModelConfig) -> dict[str, np.ndarray]:
    """Constant tensors of the model's files: name -> float32 array."""
    return {
        f"model.layers.{layer}.{item.name}": np.full(item.shape(model), item.value, np.float32)
        for item in family.constants
        for layer, spec in enumerate(model.layer_specs())
        if spec.experts or not item.of_experts
    }


def _rows(declared: tuple[Tensor, ...], model: ModelConfig) -> list[Row]:
    known, found = slots(model), []
    for item in declared:
        for layer, spec in enumerate(model.layer_specs()) if "{l}" in item.name else [(None, None)]:
            experts: list[int | None] = list(range(spec.experts)) if spec else []
            per_expert = "{e}" in item.name or item.stacked
            held = [
                tuple(TensorId(part, layer, expert) for part in item.parts)
                for expert in (experts if per_expert else [None])
            ]
            held = [parts for parts in held if any(part in known for part in parts)]
            if not held:
                continue  # this layer has none
            if item.stacked:
                found.append(Row(item.name.format(l=layer), tuple(held), True))
            else:
                found += [
                    Row(item.name.format(l=layer, e=parts[0].expert), (parts,), False)
                    for parts in held
                ]
    return found
