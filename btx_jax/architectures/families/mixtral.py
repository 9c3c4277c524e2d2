"""Mixtral: the mixture of Llama, Mistral and unfused Phi models."""

from btx_jax.architectures.families import mistral
from btx_jax.architectures.family import (
    ATTENTION,
    FUSED_EXPERTS,
    NORMS,
    OUTSIDE,
    Family,
    MoEKeys,
    tensor,
)

_EXPERT = {"w1": "ffn/gate", "w2": "ffn/down", "w3": "ffn/up"}

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    tensors=(
        *OUTSIDE,
        *NORMS,
        *ATTENTION,
        tensor("block_sparse_moe.gate.weight", "ffn/router"),
        *(
            tensor(f"block_sparse_moe.experts.{{e}}.{name}.weight", our)
            for name, our in _EXPERT.items()
        ),
    ),
    also=(
        tensor("mlp.gate.weight", "ffn/router"),
        *(tensor(f"mlp.experts.{{e}}.{name}.weight", our) for name, our in _EXPERT.items()),
        *FUSED_EXPERTS,
        tensor("block_sparse_moe.experts.gate_up_proj", "ffn/gate", "ffn/up", stacked=True),
        tensor("block_sparse_moe.experts.down_proj", "ffn/down", stacked=True),
    ),
    defaults=mistral.DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
    window="always",
    moe=MoEKeys(("num_local_experts", "num_experts")),
    usual={"router_aux_loss_coef": 0.01, "router_jitter_noise": 0.0, "output_router_logits": False},
    head_dim_since="4.47.0",
    scaling_since="5.0.0",
    fallback=1,
    peft_default=("q_proj", "v_proj"),
)
