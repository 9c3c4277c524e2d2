"""VaultGemma: Gemma 2 without norms after its blocks."""

from btx_jax.architectures.families import gemma, gemma2
from btx_jax.architectures.family import ATTENTION, ATTENTION_MAPS, DENSE, OUTSIDE, Family, tensor

FAMILY = Family(
    "vaultgemma",
    "VaultGemmaForCausalLM",
    tensors=(
        *OUTSIDE,
        tensor("input_layernorm.weight", "attention_norm/scale"),
        *ATTENTION,
        tensor("pre_feedforward_layernorm.weight", "ffn_norm/scale"),
        *DENSE,
    ),
    defaults=gemma2.DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS},
    maths=gemma.MATHS,
    activation_key="hidden_activation",
    activations=gemma.GELU,
    numbers=gemma2.CAPS,
    query_scalar="query_pre_attn_scalar",
    embeds_by_width=True,
    window="always",
    window_layers="spaced",
    full_every=2,
    since="4.57.0",
    whole_heads=True,
)
