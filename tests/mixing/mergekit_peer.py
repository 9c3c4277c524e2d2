"""mergekit-moe's own results: the golden gates of test_recipe.py.

    python tests/mixing/mergekit_peer.py tests/mixing/golden      # in an environment with
    mergekit==0.1.5

Writes four small Llamas with a byte-level tokenizer, mixes a, b and c over `base` with the recipe
below in every gate mode that reads prompts, and keeps the routers. Prompts in one list have equal
lengths, as mergekit 0.1.5 would average padding into hidden_avg.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RECIPE = {
    "base_model": "base",
    "gate_mode": "hidden",
    "dtype": "float32",
    "experts_per_token": 2,
    "experts": [
        {
            "source_model": "a",
            "positive_prompts": ["What is 2+2?", "Solve x=3+y."],
            "negative_prompts": ["Long ago a king lived"],
        },
        {
            "source_model": "b",
            "positive_prompts": ["def f(x): return x + 1", "import numpy as numpy!"],
        },
        {
            "source_model": "c",
            "positive_prompts": ["Paris is the capital of"],
            "negative_prompts": ["12345", "1+1=2"],
        },
    ],
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    pieces = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    for name in ("base", "a", "b", "c"):
        config = transformers.LlamaConfig(
            vocab_size=len(pieces), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            (
                parameter.data.normal_(0, 0.15)
                if parameter.dim() > 1
                else parameter.data.normal_(1, 0.1)
            )
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    (folder / "recipe.yml").write_text(json.dumps(RECIPE, indent=1))
    gates = {}
    for mode in ("cheap_embed", "hidden", "hidden_avg"):
        with tempfile.TemporaryDirectory() as out:
            (folder / "mode.yml").write_text(json.dumps(RECIPE | {"gate_mode": mode}))
            command = [
                str(Path(sys.executable).with_name("mergekit-moe")),
                "mode.yml",
                f"{out}/moe",
                "--device",
                "cpu",
            ]
            subprocess.run(command, check=True, cwd=folder)
            tensors = {
                name: t
                for file in Path(out, "moe").glob("*.safetensors")
                for name, t in load_file(file).items()
            }
            gates[mode] = np.stack(
                [tensors[f"model.layers.{i}.mlp.gate.weight"].float().numpy() for i in range(3)]
            )
    (folder / "mode.yml").unlink()
    np.savez(folder / "gates.npz", **gates)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
