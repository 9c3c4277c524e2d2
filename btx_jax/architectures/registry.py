"""All families that can be read and written: what lies in families/, by model_type."""

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
    """model_type -> family."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families.__path__):
        loaded = importlib.import_module(f"{families.__name__}.{module.name}")
        family = loaded.FAMILY
        if family.model_type in found:
            raise ValueError(f"{family.model_type} is declared twice")
        found[family.model_type] = family
    for family in found.values():
        if family.home and (family.home not in found or not found[family.home].moe):
            raise ValueError(f"{family.model_type}: {family.home} is no family of mixtures")
    return found


def candidates(is_mixture: bool, origin: str = "") -> list[Family]:
    """The families to try, in this order, for a model from a directory of model_type origin: its
    own, the home of its mixtures, then those that hold what others do not."""
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
    """The family to write the model as: that of the directory it came from (its model_type), the
    home of its mixtures, or the first other one that holds it. Raises UserError, with what the
    preferred one lacks, when there is none."""
    tried = candidates(model.moe is not None, origin)
    for family in tried:
        if not family.lacks(model):
            return family
    raise UserError(f"{_why_not(tried[0], model)}; keep the model in btx_jax's own format")


def require_held(family: Family, model: ModelConfig) -> None:
    """Raises UserError when the family cannot hold the model."""
    if family.lacks(model):
        raise UserError(_why_not(family, model))


def _why_not(family: Family, model: ModelConfig) -> str:
    return f"Hugging Face's {family.model_class} cannot hold {'; '.join(family.lacks(model))}"
