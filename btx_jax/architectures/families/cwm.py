"""CWM, the Code World Model: three of every four layers have a sliding window."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "cwm",
    "CwmForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 128_256,
        "hidden_size": 6144,
        "intermediate_size": 21_504,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": 8192,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    biases={"mlp_bias": FEED_FORWARD_MAPS},
    window="always",
    window_layers="spaced",
    full_every=4,
    full_first=True,
    home="granitemoe_swa",
    since="5.0.0",
)
