"""Gemma 1: norms that multiply by 1 + scale, embeddings multiplied by the square root of the width,
and the tanh approximation of GELU."""

from btx_jax.architectures.family import ATTENTION_MAPS, Family

MATHS = {"norm": "rms_plus_one"}
GELU = {"gelu_pytorch_tanh": "gelu_tanh"}
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "attention_bias": False,
}
CAUSAL = {"use_bidirectional_attention": (None, False)}

FAMILY = Family(
    "gemma",
    "GemmaForCausalLM",
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=MATHS,
    activations=GELU | {"gelu": "gelu_tanh"},  # the name in its first releases
    embeds_by_width=True,
    fixed=CAUSAL,
    since="4.42.0",
)
