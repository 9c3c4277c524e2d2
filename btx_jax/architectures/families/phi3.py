"""Phi-3, 3.5, 4 and 4-mini: fused projections and LongRoPE; 4-mini applies RoPE to a part of each
head."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import NORMS, OUTSIDE, Family, tensor

FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    tensors=(
        *OUTSIDE,
        *NORMS,
        tensor("self_attn.qkv_proj.weight", "attention/query", "attention/key", "attention/value"),
        tensor("self_attn.o_proj.weight", "attention/out"),
        tensor("mlp.gate_up_proj.weight", "ffn/gate", "ffn/up"),
        tensor("mlp.down_proj.weight", "ffn/down"),
    ),
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    window="always",
    rotary=1.0,
    scalings=("none", "longrope"),
    home="mixtral",
    since="4.42.0",
)
