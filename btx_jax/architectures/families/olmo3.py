"""OLMo 3: OLMo 2 with a sliding window in three of every four layers, whose RoPE is not scaled."""

from btx_jax.architectures.families import olmo2
from btx_jax.architectures.family import ATTENTION_MAPS, DENSE, Family

FAMILY = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    tensors=(*olmo2.TENSORS, *DENSE),
    defaults=olmo2.DEFAULTS | {"sliding_window": 4096, "rope_theta": 500_000.0},
    biases={"attention_bias": ATTENTION_MAPS},
    maths=olmo2.MATHS,
    window="always",
    window_layers="spaced",
    full_every=4,
    local_theta=500_000.0,
    home="flex_olmo",
    since="4.57.0",
    whole_heads=True,
    own_head_dim=False,
)
