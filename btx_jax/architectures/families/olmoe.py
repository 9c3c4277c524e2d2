"""OLMoE: a mixture with norms before its blocks, and on queries and keys over all heads of a token
together."""

from btx_jax.architectures.families import flex_olmo, qwen2_moe
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    FUSED_EXPERTS,
    NORMS,
    OUTSIDE,
    QK_NORM,
    Family,
)

FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    tensors=(*OUTSIDE, *NORMS, *ATTENTION, *QK_NORM, *qwen2_moe.ROUTED),
    also=FUSED_EXPERTS,
    defaults=flex_olmo.DEFAULTS
    | {
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    biases={"attention_bias": ATTENTION_MAPS},
    maths={"qk_norm": True, "qk_norm_kind": "width"},
    moe=flex_olmo.KEYS,
    fixed={"clip_qkv": (None,)},
    usual={"output_router_logits": False},
    since="4.45.0",
    whole_heads=True,
    own_head_dim=False,
)
