"""Gemma 2: norms before and after the blocks, soft caps, and a sliding window in every other
layer."""

from btx_jax.architectures.families import gemma
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    DENSE,
    OUTSIDE,
    POST_NORMS,
    Family,
    tensor,
)

MATHS = gemma.MATHS | {"norms": "both"}
TENSORS = (
    *OUTSIDE,
    tensor("input_layernorm.weight", "attention_norm/scale"),
    *ATTENTION,
    tensor("pre_feedforward_layernorm.weight", "ffn_norm/scale"),
    *POST_NORMS,
    *DENSE,
)
CAPS = {"attention_cap": "attn_logit_softcapping", "logits_cap": "final_logit_softcapping"}
DEFAULTS = {key: value for key, value in gemma.DEFAULTS.items() if key != "hidden_act"} | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    tensors=TENSORS,
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=MATHS,
    activation_key="hidden_activation",
    activations=gemma.GELU,
    numbers=CAPS,
    query_scalar="query_pre_attn_scalar",
    embeds_by_width=True,
    window="always",
    window_layers="spaced",
    full_every=2,
    fixed=gemma.CAUSAL,
    since="4.42.0",
    whole_heads=True,
)
