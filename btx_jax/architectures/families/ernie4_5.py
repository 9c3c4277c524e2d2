"""ERNIE 4.5: interleaved RoPE, and a single key that adds a bias to every linear map."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

MATHS = {"rope_interleaved": True}
DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 103_424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
    "use_bias": False,
}

FAMILY = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    defaults=DEFAULTS,
    biases={"use_bias": ATTENTION_MAPS + FEED_FORWARD_MAPS},
    maths=MATHS,
    home="ernie4_5_moe",
    since="4.54.0",
)
