"""HunYuan dense: norms on queries and keys after RoPE."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, LLAMA_TENSORS, Family, tensor

QK_NORM = (
    tensor("self_attn.query_layernorm.weight", "attention/query_norm/scale"),
    tensor("self_attn.key_layernorm.weight", "attention/key_norm/scale"),
)
MATHS = {"qk_norm": True, "qk_norm_kind": "rotated"}
DEFAULTS = llama.DEFAULTS | {"vocab_size": 290_943, "rms_norm_eps": 1e-5}

FAMILY = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    tensors=(*LLAMA_TENSORS, *QK_NORM),
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=MATHS,
    scalings=("none", "linear", "llama3", "dynamic", "yarn", "alpha"),
    home="hunyuan_v1_moe",
    since="4.56.0",
)
