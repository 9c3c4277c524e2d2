"""OLMo 2: norms after the blocks, and on queries and keys over all heads of a token together."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    DENSE,
    OUTSIDE,
    POST_NORMS,
    QK_NORM,
    Family,
)

MATHS = {"norms": "after", "qk_norm": True, "qk_norm_kind": "width"}
TENSORS = (*OUTSIDE, *ATTENTION, *QK_NORM, *POST_NORMS)
DEFAULTS = llama.DEFAULTS | {"vocab_size": 50_304, "rms_norm_eps": 1e-5, "attention_bias": False}

FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    tensors=(*TENSORS, *DENSE),
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=MATHS,
    home="flex_olmo",
    since="4.47.0",
    whole_heads=True,
    own_head_dim=False,
)
