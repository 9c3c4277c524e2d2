"""Mix: three experts and their seed into one MoE (BTX section 3.1).

    btx run mix
    btx run mix:from_init,RELEASED_MODEL
    btx run mix:tiny --config.mix.experts="('A','B','C','SEED')"

Cost: seconds at `:tiny`; at 7B, reading four checkpoints of 27 GB onto the mesh.
Expected: 4 x 7B gives 19.72B parameters, 11.07B active with Top-2. Not useful until it is
finetuned: the router is random.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["mix"].make
