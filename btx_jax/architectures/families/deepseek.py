"""DeepSeek-MoE (v1) in the layout that mergekit-moe writes, with ungated shared experts. Its
modelling code is not part of transformers."""

from btx_jax.architectures.families import llama, qwen2_moe
from btx_jax.architectures.family import LLAMA_TENSORS, Family, MoEKeys, swiglu

_CODE = "deepseek-ai/deepseek-moe-16b-base--"

FAMILY = Family(
    "deepseek",
    "DeepseekForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        *qwen2_moe.ROUTED,
        *swiglu("mlp.shared_experts", "shared_expert"),
    ),
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 102_400,
        "num_hidden_layers": 30,
        "attention_bias": False,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    biases={"attention_bias": ("q", "k", "v", "o")},
    moe=MoEKeys(
        ("n_routed_experts",),
        d_ff="moe_intermediate_size",
        renormalise="norm_topk_prob",
        shared_count="n_shared_experts",
        step="moe_layer_freq",
        dense_first="first_k_dense_replace",
        renormalises_one=False,
    ),
    fixed={"scoring_func": ("softmax",)},
    usual={
        "scoring_func": "softmax",
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_CODE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_CODE}modeling_deepseek.DeepseekForCausalLM",
        },
    },
    scalings=("none", "linear", "dynamic"),
    since="",
    whole_heads=True,
    own_head_dim=False,
    fallback=4,
)
