"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import Family

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults=DEFAULTS,
    biases={"": ("q", "k", "v")},
    window="switched",
    window_layers="from",
    home="qwen2_moe",
    peft_default=("q_proj", "v_proj"),
)
