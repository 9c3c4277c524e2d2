"""IQuest-Coder: Llama under another model_type."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

FAMILY = Family(
    "iquestcoder",
    "LlamaForCausalLM",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 76_800,
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 80,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
    },
    biases={"attention_bias": ATTENTION_MAPS, "mlp_bias": FEED_FORWARD_MAPS},
    home="mixtral",
    fixed={"use_sliding_window": (None, False)},
    since="5.23.0",  # the oldest tested release
)
