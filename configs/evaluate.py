"""Evaluate: held-out loss of every model on every domain.

    python -m btx_jax.launch --config=configs/evaluate.py:tiny
    python -m btx_jax.launch --config=configs/evaluate.py:tiny
    --config.evaluate.models.seed=CHECKPOINT
    python -m btx_jax.launch --config=configs/evaluate.py:from_init,RELEASED_MODEL

Cost: forward passes over the held-out text; under a minute at `:tiny`.
Expected: runs/evaluate_tiny/results.json.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["evaluate"].make
