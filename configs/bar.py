"""Branch-Adapt-Route (arXiv 2604.18473): branches beside an anchor (FlexOlmo, arXiv 2507.07024), of
which ever less is frozen; what moved is averaged, then the mixture's routers alone are trained.

    btx run bar:tiny
    btx run bar:from_init,RELEASED_MODEL --workdir=runs/mine

Each branch trains half of its steps with all that is shared frozen, three tenths with embeddings
and head free, a fifth with all free but the anchor: runs expert_NAME_shared,
expert_NAME_shared_layers and expert_NAME, each from the one before. Without the last two
(`configs/math_expert.py` with `train.frozen=shared` and `train.anchor=True`) nothing is averaged.

Cost: that of configs/btx.py, but for a finetune of a tenth; a branch computes two feed-forwards for
every token. Expected (paper, 7B, mean over its domains): 49.1, where training the dense model again
on everything gives 47.8 and BTX 46.7.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["bar"].make
