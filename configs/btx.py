"""Branch-Train-MiX: three experts of a seed, each a separate job, mixed and finetuned (BTX
sections 3 and 4).

    btx submit --pipeline=btx:tiny --backend=local --workdir=runs/btx_tiny
    btx run btx:from_init,RELEASED_MODEL --workdir=runs/mine
    btx submit --pipeline=btx --backend=gke --bucket=gs://NAME --topology=v5p:2x2x2 --dry-run
    btx run btx:tiny        # the same, one stage after another

Cost: at 7B 453B tokens in branches and 80B in the finetune, 2.4e22 FLOPs (docs/on-tpus.md);
`:tiny` is the demo. Expected (paper): 47.9 on 12 tasks, seed 40.7. The seed is read from
$BTX_DATA_DIR/seed, a Hugging Face directory or a checkpoint.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["btx"].make
