"""GLM-4-0414 and GLM-Z1: GLM with additional norms after the blocks."""

from btx_jax.architectures.families import glm
from btx_jax.architectures.family import ATTENTION, NORMS, OUTSIDE, Family, tensor

FAMILY = Family(
    "glm4",
    "Glm4ForCausalLM",
    tensors=(
        *OUTSIDE,
        *NORMS,
        tensor("post_self_attn_layernorm.weight", "attention_post_norm/scale"),
        tensor("post_mlp_layernorm.weight", "ffn_post_norm/scale"),
        *ATTENTION,
        *glm.FUSED,
    ),
    defaults=glm.DEFAULTS,
    biases=glm.BIASES,
    maths=glm.MATHS | {"norms": "both"},
    rotary=0.5,
    since="4.52.0",
)
