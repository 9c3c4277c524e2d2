"""Qwen3: norms on queries and keys, and a head size independent of the width."""

from btx_jax.architectures.families import qwen2
from btx_jax.architectures.family import ATTENTION_MAPS, LLAMA_TENSORS, QK_NORM, Family

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False}

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    tensors=(*LLAMA_TENSORS, *QK_NORM),
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths={"qk_norm": True},
    window="switched",
    window_layers="from",
    home="qwen3_moe",
    since="4.51.0",
    peft_default=("q_proj", "v_proj"),
)
