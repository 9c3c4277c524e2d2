"""Knowledge expert: the seed trained further on Wikipedia (BTX section 4.1); `:tiny` on the
World Factbook.

    btx run wiki_expert --config.init=CHECKPOINT
    btx run wiki_expert:tiny --config.init=runs/seed_tiny
    btx run wiki_expert:from_init --config.init=RELEASED_MODEL

Cost: by default 42B tokens, 1.7e21 FLOPs; `:tiny` a minute on 2 cores.
Expected: held-out loss on the domain well below the seed's.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["wiki_expert"].make
