"""GraniteMoe, such as Granite 3.0 1B-A400M: the mixture of Granite models."""

from btx_jax.architectures.families import granite
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    NORMS,
    OUTSIDE,
    Family,
    MoEKeys,
    tensor,
)

ROUTED = (
    tensor("block_sparse_moe.router.layer.weight", "ffn/router"),
    tensor("block_sparse_moe.input_linear.weight", "ffn/gate", "ffn/up", stacked=True),
    tensor("block_sparse_moe.output_linear.weight", "ffn/down", stacked=True),
)
# The layout that transformers 5 keeps in memory.
ALSO = (
    tensor("block_sparse_moe.router.weight", "ffn/router"),
    tensor("block_sparse_moe.experts.gate_up_proj", "ffn/gate", "ffn/up", stacked=True),
    tensor("block_sparse_moe.experts.down_proj", "ffn/down", stacked=True),
)
DEFAULTS = granite.DEFAULTS | {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}

FAMILY = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    tensors=(*OUTSIDE, *NORMS, *ATTENTION, *ROUTED),
    also=ALSO,
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    numbers=granite.NUMBERS,
    moe=MoEKeys(("num_local_experts",)),
    usual={"output_router_logits": False},
    since="4.45.0",
    whole_heads=True,
)
