"""Context and window of a model made from several: the lengths at which its weights may be used,
which do not affect what the weights mean."""

import dataclasses
import logging
from collections.abc import Mapping

from btx_jax.config.model_config import ModelConfig

log = logging.getLogger(__name__)


def limits(models: Mapping[str, ModelConfig], warn: bool = True) -> tuple[int, int]:
    """(context, window) of a model made from `models`, given by name.

    The context is the shortest of the models'. A window that all of them share is kept; otherwise
    there is none, and the context is at most the shortest window. warn: whether to log reductions.
    """
    windows = {model.window for model in models.values()}
    window = windows.pop() if len(windows) == 1 else 0
    reach = {
        name: min(model.context, model.window) if model.window and not window else model.context
        for name, model in models.items()
    }
    least = min(reach, key=lambda name: reach[name])
    if warn and any(model.context > reach[least] for model in models.values()):
        what = "" if models[least].context == reach[least] else " by its window"
        log.warning("the context is %d, from %s, the shortest%s", reach[least], least, what)
    return reach[least], window


def within(model: ModelConfig, context: int, window: int) -> ModelConfig:
    """The same model with another context and window. With window=0, the model's own window is kept
    if its windowed layers have their own RoPE base."""
    if window or model.window_theta:
        return dataclasses.replace(model, context=context, window=window or model.window)
    return dataclasses.replace(model, context=context, window=0, window_layers=())
