"""Gemma 3, text only: norms on queries and keys, and a sliding window in five of six layers, which
have their own RoPE base."""

from btx_jax.architectures.families import gemma, gemma2
from btx_jax.architectures.family import ATTENTION_MAPS, QK_NORM, Family

FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    tensors=(*gemma2.TENSORS, *QK_NORM),
    defaults=gemma2.DEFAULTS
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "final_logit_softcapping": None,
    },
    biases={"attention_bias": ATTENTION_MAPS},
    maths=gemma2.MATHS | {"qk_norm": True},
    activation_key="hidden_activation",
    activations=gemma.GELU,
    numbers={"logits_cap": "final_logit_softcapping"},
    query_scalar="query_pre_attn_scalar",
    embeds_by_width=True,
    window="always",
    window_layers="spaced",
    full_every=6,
    full_every_key="sliding_window_pattern",
    local_theta=10_000.0,
    local_theta_key="rope_local_base_freq",
    fixed=gemma.CAUSAL | {"attn_logit_softcapping": (None,)},  # declared, but never read
    since="4.50.0",
    whole_heads=True,
)
