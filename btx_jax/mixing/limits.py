"""How far what is made of several models can see: not what their weights mean, but how long they
may be used."""

import dataclasses
import logging
from collections.abc import Mapping

from btx_jax.config.model_config import ModelConfig

log = logging.getLogger(__name__)


def limits(models: Mapping[str, ModelConfig], warn: bool = True) -> tuple[int, int]:
    """(context, window) of what is made of these models, by name. The context is no longer than any
    of theirs. A window that all of them share is kept; otherwise there is none, and the context is
    at most the shortest window. warn: whether to log what is cut."""
    windows = {model.window for model in models.values()}
    window = windows.pop() if len(windows) == 1 else 0
    reach = {
        name: min(model.context, model.window) if model.window and not window else model.context
        for name, model in models.items()
    }
    least = min(reach, key=lambda name: reach[name])
    if warn and any(model.context > reach[least] for model in models.values()):
        what = "" if models[least].context == reach[least] else " by its window"
        log.warning("the context is %d, that of %s, the shortest%s", reach[least], least, what)
    return reach[least], window


def within(model: ModelConfig, context: int, window: int) -> ModelConfig:
    """The same weights, used within other limits. A window is kept where layers have a RoPE of
    their own for it."""
    if window or model.window_theta:
        return dataclasses.replace(model, context=context, window=window or model.window)
    return dataclasses.replace(model, context=context, window=0, window_layers=())
