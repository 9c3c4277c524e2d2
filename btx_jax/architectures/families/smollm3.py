"""SmolLM3: Llama without RoPE in every fourth layer."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
    },
    biases={"attention_bias": ATTENTION_MAPS, "mlp_bias": FEED_FORWARD_MAPS},
    window="switched",
    window_layers="nope",
    nope="no_rope_layers",
    nope_every_key="no_rope_layer_interval",
    home="granitemoe_swa",
    since="4.53.0",
    whole_heads=True,
)
