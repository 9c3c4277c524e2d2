"""Branch-Train-MiX with its baselines and ablations from your own seed: every arm starts from the
same checkpoint, on the same domains.

    btx run comparison
    btx run comparison:llama2_7b,ablations
    btx run comparison:from_init,RELEASED_MODEL,main
    btx submit --pipeline=comparison --backend=gke ...

The arms are `main`, `ablations` or `all`; `submit.py` makes every stage a separate job.

Cost: `main` at the paper's 453B + 80B tokens costs about eight times BTX; start with fewer steps.
Expected (paper): seed 40.7, dense 44.5, BTM 43.4, sparse upcycling 46.3 to 47.3, BTX 47.9 on 12
tasks.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["comparison"].make
