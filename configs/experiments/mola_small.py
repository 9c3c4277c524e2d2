"""MoLA's five shapes and plain LoRA with as many parameters, on a frozen million-parameter seed and
corpora that pip can install.

    btx run mola_small --workdir=runs/mola_small_0
    btx run mola_small --config.rng_seed=1 --workdir=runs/mola_small_1
    btx run mola_small --config.rng_seed=2 --workdir=runs/mola_small_2
    btx run mola_small:report                # of all three

Cost: about 10 minutes per seed value on 2 cores. A killed run resumes.
Expected: docs/results.md. The paper's order (2468 best) comes from Llama-2-7B and question
answering.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["mola_small"].make
