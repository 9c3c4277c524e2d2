"""The paper's comparison at a million parameters: Branch-Train-MiX beside its baselines and
ablations, on corpora that pip can install.

    python -m btx_jax.launch --config=configs/experiments/paper_small.py:all
    --workdir=runs/paper_small_0 python -m btx_jax.launch
    --config=configs/experiments/paper_small.py:ablations --config.rng_seed=1
    --workdir=runs/paper_small_1

    python -m btx_jax.launch --config=configs/experiments/paper_small.py:report
    # of seeds 0, 1 and 2

Cost: `main` about 15 minutes on 2 cores, `ablations` 30, `all` 40. A killed run goes on where it
was.
Expected: docs/results.md, made of three seeds.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["paper_small"].make
