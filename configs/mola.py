"""MoLA: LoRA experts, with more in higher layers, on a frozen Hugging Face Llama, trained on a
question-answering set.

    btx run mola:arc_easy --config.init=HF_DIRECTORY --config.train.steps=1000 \\
        --config.lora.allocation=triangle:160 --config.lora.rank='(4,)'
    btx run mola:tiny    # on runs/seed_tiny, from btx run seed:tiny; or :from_init

Other tasks: commonsense_qa, gsm8k, openbook_qa, piqa. All are read from $BTX_DATA_DIR/evals. For
your own data see data.formats.

Cost: SmolLM2-135M, 300 steps of 8 x 256 tokens: about two hours on 2 CPU cores; 250 of 4 x 128,
twenty minutes; `:tiny` a minute or two.
Expected: held-out loss of the answers falls; the base is unchanged, and a checkpoint holds the
experts only.
"""

from btx_jax.presets.registry import PRESETS

get_config = PRESETS["mola"].make
