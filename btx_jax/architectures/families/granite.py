"""Granite 3: multipliers on embeddings, residual branches, attention scores and logits."""

from btx_jax.architectures.families import llama
from btx_jax.architectures.family import ATTENTION_MAPS, FEED_FORWARD_MAPS, Family

NUMBERS = {
    "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logits_divisor": "logits_scaling",
}
DEFAULTS = llama.DEFAULTS | dict.fromkeys(NUMBERS.values(), 1.0)

FAMILY = Family(
    "granite",
    "GraniteForCausalLM",
    defaults=DEFAULTS,
    biases={"attention_bias": ATTENTION_MAPS, "mlp_bias": FEED_FORWARD_MAPS},
    numbers=NUMBERS,
    home="granitemoe",
    since="4.45.0",
    whole_heads=True,
)
