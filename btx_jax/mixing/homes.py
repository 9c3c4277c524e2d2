"""The Hugging Face classes that can hold mixtures, by the names that recipes use for them."""

from collections.abc import Mapping
from typing import NamedTuple

from btx_jax.architectures.registry import known_families


class Home(NamedTuple):
    """A class that mergekit-moe writes.

    name: mergekit's name. sources: the model_types of dense models that it accepts; all models must
    have the same one. has_shared, has_gate: whether it has a shared expert, and a gate on it.
    biases: the maps that always have a bias, zero where the sources have none.
    """

    name: str
    sources: tuple[str, ...]
    has_shared: bool = False
    has_gate: bool = False
    biases: tuple[str, ...] = ()


# In the order in which mergekit-moe tries them.
MERGEKIT: Mapping[str, Home] = {
    "mixtral": Home("Mixtral", ("llama", "mistral")),
    "deepseek": Home("DeepSeek MoE", ("llama", "mistral"), has_shared=True),
    "qwen2_moe": Home(
        "Qwen MoE",
        ("llama", "mistral", "qwen2"),
        has_shared=True,
        has_gate=True,
        biases=("q", "k", "v"),
    ),
    "qwen3_moe": Home("Qwen3 MoE", ("qwen3",)),
}


def model_types(architecture: str) -> list[str]:
    """The model_types that a recipe's `architecture` can stand for: a model_type, or the first
    letters of one of mergekit's names. All of them for "", none for an unknown value."""
    mixtures = [family.model_type for family in known_families().values() if family.moe]
    if not architecture:
        return mixtures
    lowered = architecture.lower()
    if lowered in mixtures:
        return [lowered]
    return [kind for kind, home in MERGEKIT.items() if home.name.lower().startswith(lowered)]


def spellings() -> str:
    """All values that a recipe's `architecture` accepts, comma-separated, for messages."""
    others = [kind for kind in model_types("") if kind not in MERGEKIT]
    return ", ".join([*(home.name for home in MERGEKIT.values()), *MERGEKIT, *others])
