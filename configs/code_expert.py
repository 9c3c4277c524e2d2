"""Code expert: the seed trained further on source code (BTX section 4.1).

    btx run code_expert --config.init=CHECKPOINT
    btx run code_expert:tiny --config.init=runs/seed_tiny
    btx run code_expert:from_init --config.init=RELEASED_MODEL

Cost: by default 210B tokens, 8.5e21 FLOPs; `:tiny` a minute on 2 cores.
Expected (paper): code tasks from 16.8 to the level of BTM's 36.6. `:tiny`: held-out loss on code
well below the seed's.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["code_expert"].make
