"""Seed: a Llama trained from scratch.

    btx run seed:tiny
    btx run seed:from_init --config.init=CHECKPOINT

Cost: `:tiny` (1.1M parameters, 0.8M tokens) two to three minutes on 2 CPU cores. The default is
Llama-2-7B on 2T tokens, which nobody should repeat; start the experts from a released checkpoint
instead.
Expected (`:tiny`): held-out loss on prose below 3.9 nats per token.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["seed"].make
