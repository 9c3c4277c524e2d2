"""InternLM3: Llama under another model_type, usually with dynamic RoPE scaling."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "internlm3",
    "LlamaForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 128_512,
        "intermediate_size": 10_240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
    },
    biases={"attention_bias": ATTENTION_MAPS, "mlp_bias": FEED_FORWARD_MAPS},
    synonyms={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    home="mixtral",
    since="5.23.0",  # the oldest tested release
    whole_heads=True,
)
