"""OLMo 1: LayerNorms without parameters."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION, ATTENTION_MAPS, DENSE, OUTSIDE, Family

FAMILY = Family(
    "olmo",
    "OlmoForCausalLM",
    tensors=(*(row for row in OUTSIDE if "final_norm/scale" not in row.parts), *ATTENTION, *DENSE),
    defaults=llama.DEFAULTS | {"vocab_size": 50_304, "rms_norm_eps": 1e-5, "attention_bias": False},
    biases={"attention_bias": ATTENTION_MAPS},
    maths={"norm": "layer"},
    home="mixtral",
    fixed={"clip_qkv": (None,), "rms_norm_eps": (1e-5,)},
    since="4.42.0",
    own_head_dim=False,
)
