"""FlexOlmo, the mixture of OLMo 2 models."""

from btx_jax.architectures.families import olmo2, qwen2_moe
from btx_jax.architectures.family import ATTENTION_MAPS, FUSED_EXPERTS, Family, MoEKeys

KEYS = MoEKeys(("num_experts", "num_local_experts"), renormalise="norm_topk_prob")
DEFAULTS = olmo2.DEFAULTS | {
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500_000.0,
    "num_experts": 7,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}

FAMILY = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    tensors=(*olmo2.TENSORS, *qwen2_moe.ROUTED),
    also=FUSED_EXPERTS,
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=olmo2.MATHS,
    moe=KEYS,
    usual={"output_router_logits": False},
    since="4.57.0",
    whole_heads=True,
    own_head_dim=False,
)
