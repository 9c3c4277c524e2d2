"""GLM-4 (2024): fused gate and up projections, interleaved RoPE on half of each head."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION, NORMS, OUTSIDE, Family, tensor

MATHS = {"rope_interleaved": True}
FUSED = (
    tensor("mlp.gate_up_proj.weight", "ffn/gate", "ffn/up"),
    tensor("mlp.down_proj.weight", "ffn/down"),
)
BIASES = {"attention_bias": ("q", "k", "v")}
DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151_552,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}

FAMILY = Family(
    "glm",
    "GlmForCausalLM",
    tensors=(*OUTSIDE, *NORMS, *ATTENTION, *FUSED),
    defaults=DEFAULTS,
    biases=BIASES,
    maths=MATHS,
    rotary=0.5,
    since="4.46.0",
)
