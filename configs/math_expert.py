"""Maths expert: the seed trained further on mathematical text (BTX section 4.1).

    btx run math_expert --config.init=CHECKPOINT
    btx run math_expert:tiny --config.init=runs/seed_tiny [--config.data.train=FILES]
    btx run math_expert:from_init --config.init=RELEASED_MODEL

Cost: by default 201B tokens, 8.1e21 FLOPs: about 65 hours on 256 TPU v5p chips at 30 % MFU
(calculated). `:tiny` a minute on 2 cores. Expected (paper): 8.6 -> 18 or more on its maths tasks.
`:tiny`: held-out loss on maths well below the seed's.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["math_expert"].make
