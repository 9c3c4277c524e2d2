"""Ministral 8B (2024): Mistral with a sliding window in some of its layers."""

from btx_jax.architectures.families import mistral
from btx_jax.architectures.family import Family

FAMILY = Family(
    "ministral",
    "MinistralForCausalLM",
    defaults=mistral.DEFAULTS,
    window="always",
    window_layers="typed",
    home="granitemoe_swa",
    since="4.57.0",
)
