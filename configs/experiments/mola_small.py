"""MoLA's five shapes and plain LoRA of as many parameters, on a frozen million-parameter seed and
corpora that pip can install.

    python -m btx_jax.launch --config=configs/experiments/mola_small.py --workdir=runs/mola_small_0
    python -m btx_jax.launch --config=configs/experiments/mola_small.py --config.rng_seed=1
    --workdir=runs/mola_small_1 python -m btx_jax.launch --config=configs/experiments/mola_small.py
    --config.rng_seed=2 --workdir=runs/mola_small_2 python -m btx_jax.launch
    --config=configs/experiments/mola_small.py:report                # of all three

Cost: about 10 minutes a seed value on 2 cores. A killed run goes on where it was.
Expected: docs/results.md. The paper's order (2468 best) comes from Llama-2-7B and question
answering.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["mola_small"].make
