"""Mistral, from 0.1 (the only one with a sliding window) to Small."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import Family

DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    defaults=DEFAULTS,
    window="always",
    window_layers="typed",  # transformers loads a Mistral with layer_types as Ministral
    home="mixtral",
    fallback=2,
    peft_default=("q_proj", "v_proj"),
)
