"""When does mixing pay? Branch-Train-MiX at a million parameters, from a seed of 20M tokens: what
branches lose when they are mixed, and the mixture at its best beside tuned peers.

    python -m btx_jax.data.corpora           # 88 MB of text in runs/corpora, a minute
    btx run paper_small:tuning --workdir=runs/paper_small_0
    btx run paper_small:all --config.rng_seed=1 --workdir=runs/paper_small_1
    btx run paper_small:all --config.rng_seed=2 --workdir=runs/paper_small_2
    btx run paper_small:report               # of all three

Cost on 2 idle cores: the seed 30 minutes, `branches` (what branches lose) an hour with it, `main`
(BTX and its peers) 2, `all` (the paper's other arms, the split of compute) 3, `tuning` (every
finetune, every rate) 4.5. A killed run resumes; `--only=STAGE` runs one stage.
Expected: docs/results.md.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["paper_small"].make
