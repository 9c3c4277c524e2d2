"""MoE finetune: the mixture trained on all domains together (BTX section 3.2), Top-2 with load
balancing.

    btx run moe_finetune --config.init=runs/mix
    btx run moe_finetune:from_init --config.init=MIXTURE
    btx run moe_finetune:tiny --config.init=runs/mix_tiny

`from_init` takes a mixture of any size and number of experts, on one machine.

Cost: by default 80B tokens, 5.3e21 FLOPs; `:tiny` about two minutes on 2 cores.
Expected (paper): 47.9 on 12 tasks, seed 40.7. `:tiny`: mean held-out loss below the seed's and
every expert's.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["moe_finetune"].make
