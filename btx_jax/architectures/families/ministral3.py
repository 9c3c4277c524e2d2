"""Ministral 3, text only: YaRN, and queries whose scale grows with their position."""

from btx_jax.architectures.families import mistral
from btx_jax.architectures.family import Family

FAMILY = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    defaults=mistral.DEFAULTS
    | {
        "vocab_size": 131_072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    window="always",
    grows_queries=True,
    since="5.0.0",
)
