"""Qwen3-MoE, such as Qwen3-30B-A3B."""

import dataclasses

from btx_jax.architectures.families import qwen2_moe
from btx_jax.architectures.family import (
    ATTENTION_MAPS,
    FUSED_EXPERTS,
    LLAMA_TENSORS,
    QK_NORM,
    Family,
)

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    tensors=(*LLAMA_TENSORS, *QK_NORM, *qwen2_moe.ROUTED),
    also=FUSED_EXPERTS,
    defaults=qwen2_moe.DEFAULTS
    | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "attention_bias": False,
    },
    biases={"attention_bias": ATTENTION_MAPS},
    maths={"qk_norm": True},
    window="switched",
    moe=dataclasses.replace(qwen2_moe.KEYS, experts=("num_experts", "num_local_experts")),
    usual={"output_router_logits": False},
    since="4.51.0",
    fallback=3,
)
