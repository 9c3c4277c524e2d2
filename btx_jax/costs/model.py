"""What a model's training costs by its formulas, without compiling anything."""

from btx_jax.config.model_config import ModelConfig
from btx_jax.models.llama import parameter_counts


def train_flops(config: ModelConfig, tokens: int) -> float:
    """6 x active parameters x tokens: forward and backward, without attention scores and without
    rematerialisation. A frozen base under
    LoRA experts needs no gradient of its own: 4 x."""
    base = parameter_counts(config.base())[1]
    return (4.0 if config.lora else 6.0) * base * tokens + 6.0 * (
        parameter_counts(config)[1] - base
    ) * tokens


def attention_flops(config: ModelConfig, tokens: int, length: int) -> float:
    """Scores and weighted sums of causal attention over whole sequences of this length, forward and
    backward. A token sees half of them in the mean; of a window, all of it but at the beginning."""
    window = min(config.window or length, length)
    seen = window * (1 - window / (2 * length))
    return 12.0 * config.layers * config.heads * config.head_dim * seen * tokens
