"""Ministral 8B of 2024: a Mistral of which some layers have a window."""

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
