"""Sparse upcycling baseline: four copies of the seed's feed-forward blocks (arXiv 2212.05055);
finetune the result with moe_finetune.

    python -m btx_jax.launch --config=configs/sparse_upcycling.py:tiny
    python -m btx_jax.launch --config=configs/sparse_upcycling.py:from_init,RELEASED_MODEL
    python -m btx_jax.launch --config=configs/moe_finetune.py:tiny
    --config.init=runs/sparse_upcycling_tiny --workdir=runs/upcycled_tiny

Cost: seconds; then that of moe_finetune.
Expected (paper): 46.3 on 12 tasks with the same data as BTX's 47.9. Before the finetune, exactly
the seed.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["sparse_upcycling"].make
