"""The paper's comparison at a million parameters: Branch-Train-MiX beside its baselines and
ablations, on corpora that pip can install.

    btx run paper_small:all --workdir=runs/paper_small_0
    btx run paper_small:ablations --config.rng_seed=1 --workdir=runs/paper_small_1
    btx run paper_small:report               # of seeds 0, 1 and 2

Cost: `main` about 15 minutes on 2 cores, `ablations` 30, `all` 40. A killed run goes on where it
was.
Expected: docs/results.md, made of three seeds.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["paper_small"].make
