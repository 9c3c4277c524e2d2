"""The linear maps that LoRA can adapt, under the module names of a family, as peft uses them."""

import functools
import math
from collections.abc import Collection, Mapping

from btx_jax.architectures.family import ATTENTION_MAPS, Family
from btx_jax.architectures.registry import known_families
from btx_jax.architectures.tensors import TensorId, slots
from btx_jax.config.model_config import ModelConfig

PARTS = {
    "q": "attention/query",
    "k": "attention/key",
    "v": "attention/value",
    "o": "attention/out",
    "gate": "ffn/gate",
    "up": "ffn/up",
    "down": "ffn/down",
}
_TARGET_OF = {part: target for target, part in PARTS.items()}
_PREFIX, _SUFFIX = "model.layers.{l}.", ".weight"


def adapted(target: str, layer: int) -> TensorId:
    """The weight in `layer` that a LoRA for this target adapts."""
    return TensorId(PARTS[target], layer)


@functools.cache
def modules_of_layer(family: Family) -> Mapping[str, tuple[str, ...]]:
    """Module of a dense layer, such as self_attn.qkv_proj -> its targets, in the order of their
    rows. Experts cannot be targets."""
    found = {}
    for tensor in family.tensors:
        targets = tuple(_TARGET_OF[part] for part in tensor.parts if part in _TARGET_OF)
        shared = tensor.stacked or "{e}" in tensor.name
        if targets and len(targets) == len(tensor.parts) and not shared:
            found[tensor.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)] = targets
    return found


def modules(family: Family, model: ModelConfig) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Full module name -> (layer, targets), for every module that LoRA can adapt. In a mixture
    these are only the attention modules."""
    known = slots(model)
    return {
        f"{_PREFIX.format(l=layer)}{name}": (layer, targets)
        for layer in range(model.layers)
        for name, targets in modules_of_layer(family).items()
        if (not model.moe or set(targets) <= set(ATTENTION_MAPS))
        and all(adapted(target, layer) in known for target in targets)
    }


def families_with(modules: Collection[str]) -> list[str]:
    """The model_types whose layers have any of these modules: most matches first, and among equals
    by fallback rank."""

    def count(family: Family) -> int:
        return len(set(modules) & set(modules_of_layer(family)))

    found = sorted(
        filter(count, known_families().values()),
        key=lambda family: (-count(family), family.fallback or math.inf),
    )
    return [family.model_type for family in found]
