"""Branch-Train-MiX from scratch to a report on a laptop CPU, on corpora that pip can install
anywhere.

    btx run demo [--config.rng_seed=1 --workdir=runs/demo-1]

Cost: under ten minutes on 2 CPU cores. About 3.2M tokens in total, 1.1M parameters per branch.
Expected: every expert is the best of the three on its own domain; `btx` has a lower mean held-out
loss than the seed and every expert, and forgets less prose than any expert. `dense`, trained on as
many tokens of the same text, is lower still: with a seed that has seen so little text, mixing does
not pay off (docs/results.md). Results are in runs/demo/summary.json and runs/demo/report.html.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["demo"].make
