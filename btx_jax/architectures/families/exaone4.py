"""EXAONE 4: norms after the blocks and on queries and keys. Where some layers have a sliding
window, the others have no RoPE."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import (
    ATTENTION,
    DENSE,
    OUTSIDE,
    POST_NORMS,
    QK_NORM,
    Family,
)

FAMILY = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    tensors=(*OUTSIDE, *ATTENTION, *QK_NORM, *POST_NORMS, *DENSE),
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 102_400,
        "intermediate_size": 16_384,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    },
    maths={"norms": "after", "qk_norm": True},
    window="always",
    window_layers="spaced",
    full_every=4,
    full_every_key="sliding_window_pattern",
    full_rotates=False,
    since="4.54.0",
)
