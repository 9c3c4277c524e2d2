"""Tasks learnt one after another on the same LoRA experts, with all tasks evaluated after each:
overall performance, performance drop and backward transfer (MoLA, section 4.4).

    btx run continual:arc_easy,openbook_qa,commonsense_qa --workdir=runs/continual \\
        --config.pipeline.arc_easy.config.init=HF_DIRECTORY

The first task starts from the model named there ($BTX_DATA_DIR/seed by default), every other task
from the previous one. Items come from $BTX_DATA_DIR/evals; a tenth of each task's, chosen by a
hash, is held out from training and evaluated.

Cost: SmolLM2-135M, three tasks of 300 steps: about six hours on 2 CPU cores.
Expected: a table of scores in the report, with OP, PD and BWT in summary.json.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["continual"].make
