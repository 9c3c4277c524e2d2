"""Seed-OSS: Llama with biases on queries, keys and values, and a head size independent of the
width."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 155_136,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
    },
    biases={
        "attention_bias": ("q", "k", "v"),
        "attention_out_bias": ("o",),
        "mlp_bias": FEED_FORWARD_MAPS,
    },
    home="qwen2_moe",
    usual={"attention_dropout": 0.1, "residual_dropout": 0.1},
    since="4.56.0",
)
