"""Dense baseline: the seed trained further on all data that BTX saw, without branches (BTX section
4.2).

    btx run dense --config.init=CHECKPOINT
    btx run dense:tiny --config.init=runs/seed_tiny
    btx run dense:from_init --config.init=RELEASED_MODEL

Cost: by default 533B tokens, 2.2e22 FLOPs; `:tiny` four minutes on 2 cores.
Expected (paper): 44.5 on 12 tasks, between the seed's 40.7 and BTX's 47.9. Domain text and mix are
interleaved, not in sequence.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["dense"].make
