"""HunYuan MoE, the mixture of dense HunYuan models, with a shared expert as wide as the routed
ones."""

from btx_jax.architectures.families import hunyuan_v1_dense
from btx_jax.architectures.family import (
    ATTENTION,
    ATTENTION_MAPS,
    FUSED_EXPERTS,
    NORMS,
    OUTSIDE,
    Family,
    MoEKeys,
    swiglu,
    tensor,
)

FAMILY = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    tensors=(
        *OUTSIDE,
        *NORMS,
        *ATTENTION,
        *hunyuan_v1_dense.QK_NORM,
        tensor("mlp.gate.wg.weight", "ffn/router"),
        *swiglu("mlp.experts.{e}", "ffn"),
        *swiglu("mlp.shared_mlp", "shared_expert"),
    ),
    also=FUSED_EXPERTS,
    defaults=hunyuan_v1_dense.DEFAULTS | {"num_experts": 1, "moe_topk": 1},
    biases={"attention_bias": ATTENTION_MAPS},
    maths=hunyuan_v1_dense.MATHS,
    scalings=hunyuan_v1_dense.FAMILY.scalings,
    moe=MoEKeys(("num_experts",), k="moe_topk", shares_one=True),
    usual={"output_router_logits": False},
    since="4.56.0",
)
