"""Sparse upcycling baseline: four copies of the seed's feed-forward blocks (arXiv 2212.05055);
finetune the result with moe_finetune.

    btx run sparse_upcycling:tiny
    btx run sparse_upcycling:from_init,RELEASED_MODEL
    btx run moe_finetune:tiny --config.init=runs/sparse_upcycling_tiny --workdir=runs/upcycled_tiny

With --config.mix.reinit=0.5 --config.mix.router=uniform it is Drop-Upcycling (arXiv 2502.19261):
half of each copy's hidden units are reinitialised, different ones in each copy.

Cost: seconds, then as moe_finetune.
Expected (paper): 46.3 on 12 tasks with the same data as BTX's 47.9. Before the finetune it equals
the seed exactly, except for reinitialised units.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["sparse_upcycling"].make
