"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM, Yi, Falcon 3, DeepSeek-LLM and related models."""

from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # the number of heads
    "head_dim": None,  # hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS, "mlp_bias": FEED_FORWARD_MAPS},
    home="mixtral",
    usual={"pretraining_tp": 1},
    head_dim_since="4.45.0",
    fallback=1,
    whole_heads=True,
    peft_default=("q_proj", "v_proj"),
)
