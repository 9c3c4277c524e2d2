"""GraniteMoeSWA: GraniteMoe with sliding windows and layers without RoPE. Its attention sinks are
read and written as -1e30, which disables them."""

from btx_jax.architectures.families import granite, granitemoe
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    NORMS,
    OUTSIDE,
    Constant,
    Family,
    MoEKeys,
)

FAMILY = Family(
    "granitemoe_swa",
    "GraniteMoeSWAForCausalLM",
    tensors=(*OUTSIDE, *NORMS, *ATTENTION, *granitemoe.ALSO),
    also=granitemoe.ROUTED,
    constants=(Constant("self_attn.sinks", -1e30, lambda model: (model.heads,)),),
    defaults=granitemoe.DEFAULTS | {"sliding_window": 128, "shared_intermediate_size": 0},
    biases={"attention_bias": ATTENTION_MAPS},
    numbers=granite.NUMBERS,
    window="always",
    window_layers="spaced",
    full_every=4,
    full_first=True,
    nope="layer_rope_theta",
    nope_thetas=True,
    moe=MoEKeys(("num_local_experts",)),
    fixed={"shared_intermediate_size": (0,)},
    usual={"output_router_logits": False, "shared_intermediate_size": 0},
    since="5.23.0",  # the oldest tested release
    whole_heads=True,
)
