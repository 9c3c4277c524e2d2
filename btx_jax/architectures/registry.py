"""Registry of all families in families/, by model_type."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from btx_jax.architectures import families
from btx_jax.architectures.family import Family
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError


@functools.cache
def known_families() -> Mapping[str, Family]:
    """model_type -> family. Raises ValueError for duplicates and for homes that are not
    mixtures."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__):
        loaded = importlib.import_module(f"{families.__name__}.{module.name}")
        family = loaded.FAMILY
        if family.model_type in found:
            raise ValueError(f"{family.model_type} is declared twice")
        found[family.model_type] = family
    for family in found.values():
        if family.home and (family.home not in found or not found[family.home].moe):
            raise ValueError(f"{family.model_type}: {family.home} is not a family of mixtures")
    return found


def candidates(is_mixture: bool, origin: str = "") -> list[Family]:
    """The families to try for a model that came from a directory of model_type `origin`, in order:
    that family, its home for mixtures, then those with a fallback rank."""
    found = known_families()
    own = found.get(origin)
    preferred: list[Family] = []
    if own and (own.moe is not None) == is_mixture:
        preferred = [own]
    elif own and is_mixture:
        preferred = [found[own.home]] if own.home else []
    elif own:
        preferred = [family for family in found.values() if family.home == origin]
        preferred.sort(key=lambda family: family.fallback or len(found))
    others = sorted((f for f in found.values() if f.fallback), key=lambda family: family.fallback)
    return [*preferred, *(f for f in others if (f.moe is not None) == is_mixture)]


def family_for(model: ModelConfig, origin: str = "") -> Family:
    """The family to write the model as: that of its origin (a model_type), the home of the origin's
    mixtures, or the first fallback that can hold it.

    Raises UserError, naming what the preferred family lacks, when none can hold it.
    """
    tried = candidates(model.moe is not None, origin)
    for family in tried:
        if not family.lacks(model):
            return family
    raise UserError(f"{_why_not(tried[0], model)}; keep the model in btx_jax's own format")


def require_held(family: Family, model: ModelConfig) -> None:
    """Raise UserError when the family cannot hold the model."""
    if family.lacks(model):
        raise UserError(_why_not(family, model))


def _why_not(family: Family, model: ModelConfig) -> str:
    return f"Hugging Face's {family.model_class} cannot hold {'; '.join(family.lacks(model))}"
