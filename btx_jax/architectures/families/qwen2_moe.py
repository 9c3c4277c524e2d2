"""Qwen1.5-MoE and Qwen2-MoE: a shared expert with a sigmoid gate next to the routed experts."""

import dataclasses

from btx_jax.architectures.families import qwen2
from btx_jax.architectures.family import (
    FUSED_EXPERTS,
    LLAMA_TENSORS,
    Family,
    MoEKeys,
    swiglu,
    tensor,
)

ROUTED = (tensor("mlp.gate.weight", "ffn/router"), *swiglu("mlp.experts.{e}", "ffn"))
KEYS = MoEKeys(
    ("num_experts",),
    d_ff="moe_intermediate_size",
    renormalise="norm_topk_prob",
    dense_list="mlp_only_layers",
    step="decoder_sparse_step",
)
DEFAULTS = qwen2.DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        *ROUTED,
        *swiglu("mlp.shared_expert", "shared_expert"),
        tensor("mlp.shared_expert_gate.weight", "shared_expert/router"),
    ),
    also=FUSED_EXPERTS,
    defaults=DEFAULTS | {"shared_expert_intermediate_size": 5632, "qkv_bias": True},
    biases={"qkv_bias": ("q", "k", "v")},
    window="switched",
    window_layers="even",
    moe=dataclasses.replace(
        KEYS,
        shared_d_ff="shared_expert_intermediate_size",
        has_shared_gate=True,
        needs_shared=True,
    ),
    usual={"output_router_logits": False},
    since="4.50.0",
    fallback=2,
)
