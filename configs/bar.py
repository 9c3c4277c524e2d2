"""Branch-Adapt-Route (arXiv 2604.18473): branches with an anchor (FlexOlmo, arXiv 2507.07024)
that are unfrozen in stages; shared parameters are averaged, then only the routers are trained.

    btx run bar:tiny
    btx run bar:from_init,RELEASED_MODEL --workdir=runs/mine

Each branch trains half of its steps with all shared parameters frozen, three tenths with embeddings
and head trained, and a fifth with everything but the anchor trained. These are the runs
expert_NAME_shared, expert_NAME_shared_layers and expert_NAME, each starting from the previous one.
Without the last two (`configs/math_expert.py` with `train.frozen=shared` and `train.anchor=True`)
nothing is averaged.

Cost: as configs/btx.py, but a tenth of its finetune; a branch computes two feed-forwards for
every token. `:tiny` takes less than half an hour on 2 cores shared with other work.
Expected (paper, 7B, mean over its domains): 49.1; further dense training on all text gives 47.8,
BTX 46.7. `:tiny`, held-out nats of maths, code, world, prose:

    seed                                              1.563  5.289  4.995  4.434
    mixed, routers not trained                        2.401  5.345  4.992  4.910
    mixed, routers trained for 20 steps               1.428  5.207  4.978  4.895
    mixed after the first runs, routers not trained   1.975  5.282  4.970  4.545
    the same, routers trained for 20 steps            1.336  5.171  4.954  4.544

At this size and rate (2e-3), averaging loses more than the later runs gain.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["bar"].make
