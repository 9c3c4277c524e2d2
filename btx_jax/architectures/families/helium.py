"""Helium 1: Llama with interleaved RoPE."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "helium",
    "HeliumForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 48_000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100_000.0,
    },
    biases={"attention_bias": ("q", "k", "v"), "mlp_bias": FEED_FORWARD_MAPS},
    maths={"rope_interleaved": True},
    home="ernie4_5_moe",
    since="4.49.0",
    whole_heads=True,
    own_head_dim=False,
)
