"""Evaluate: held-out loss of every model on every domain.

    btx run evaluate:tiny
    btx run evaluate:tiny --config.evaluate.models.seed=CHECKPOINT
    btx run evaluate:from_init,RELEASED_MODEL

Cost: forward passes over the held-out text; under a minute at `:tiny`.
Expected: runs/evaluate_tiny/results.json.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["evaluate"].make
