"""AdamW with the learning-rate schedule of the BTX paper."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from btx_jax.config.config import TrainConfig
from btx_jax.models.leaves import is_anchor, is_feed_forward, is_norm_or_bias, is_router
from btx_jax.models.lora import is_adapter, partition


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to learning_rate over warmup_steps, then cosine decay to final_lr_fraction of
    it at the last step (BTX section 4)."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(config.warmup_steps, 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_lr_fraction,
    )


def decayed(params: Any) -> Any:
    """Weight decay mask, a tree of bools: true for kernels and the embedding, false for biases and
    norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_norm_or_bias(path), params)


def clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Like optax.clip_by_global_norm, but multiplies by a single factor: optax's elementwise
    division prevents XLA from fusing the clipping into AdamW."""

    def clip(updates: Any, _: Any = None) -> Any:
        factor = jnp.minimum(
            1.0, norm / jnp.maximum(optax.global_norm(updates), jnp.finfo(jnp.float32).tiny)
        )
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def is_trained(path: tuple[str, ...], frozen: str) -> bool:
    """Whether a run with TrainConfig.frozen trains the parameter at this path."""
    if frozen == "base":
        return is_adapter(path)
    if frozen == "all_but_routers":
        return is_router(path)
    if frozen == "shared":
        return is_feed_forward(path)
    if frozen == "shared_layers":
        return is_feed_forward(path) or path[0] in ("embed", "head")
    if frozen == "anchor":
        return not is_anchor(path)
    is_expert = is_feed_forward(path) or is_anchor(path)
    return not (frozen == "experts" and is_expert and not is_router(path))


def split(params: Mapping[str, Any], frozen: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into (trained, frozen). `lora.join` is the inverse."""
    return partition(params, lambda path: is_trained(path, frozen))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping followed by AdamW, for the trained parameters that `split` returns."""
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config),
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
            mu_dtype=config.first_moment_dtype,
        ),
    )
