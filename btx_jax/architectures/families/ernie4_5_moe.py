"""ERNIE 4.5 MoE, the mixture of ERNIE 4.5 models. Its correction bias on the router's probabilities
is read and written as zero."""

from btx_jax.architectures.families import ernie4_5, qwen2_moe
from btx_jax.architectures.family import (
    FUSED_EXPERTS,
    LLAMA_TENSORS,
    Constant,
    Family,
    MoEKeys,
    swiglu,
)


def _one_of_each(model):
    return (1, max(model.moe.experts))


FAMILY = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        *qwen2_moe.ROUTED,
        *swiglu("mlp.shared_experts", "shared_expert"),
    ),
    also=FUSED_EXPERTS,
    constants=(
        Constant("mlp.moe_statics.e_score_correction_bias", 0.0, _one_of_each, of_experts=True),
    ),
    defaults=ernie4_5.DEFAULTS
    | {
        "hidden_size": 2560,
        "intermediate_size": 12_288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "router_aux_loss_coef": 0.001,
    },
    biases={"use_bias": ("q", "k", "v", "o")},
    maths=ernie4_5.MATHS,
    moe=MoEKeys(
        ("moe_num_experts", "num_experts"),
        k="moe_k",
        d_ff="moe_intermediate_size",
        shared_count="moe_num_shared_experts",
        none_shared=0,
        dense_first="moe_layer_start_index",
        last="moe_layer_end_index",
    ),
    fixed={"moe_layer_interval": (1,), "moe_norm_min": (1e-12,)},
    usual={"output_router_logits": False},
    since="4.54.0",
)
