"""mergekit-moe's own results in each of its layouts: golden_layouts of test_mergekit_layouts.py.

    python tests/mixing/mergekit_layouts_peer.py tests/mixing/golden_layouts     # in an
    environment with mergekit==0.1.5 and peft

Writes three small models of each family below sources/ (the base with a byte-level tokenizer) and a
LoRA, then one directory for each recipe: recipe.yml, and config.json and model.safetensors as
written by mergekit. Paths in recipes are relative to the folder that contains all of these.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from mergekit.common import ModelReference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PIECES = [
    "<s>",
    "</s>",
    "<unk>",
    "Ġ",
    *"abcdefghijklmnopqrstuvwxyz0123456789+-*/=().,:?!'\"_[]<>&;",
]
SHAPE = {
    "vocab_size": len(PIECES),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
FAMILIES = {  # model, dtype, whether its tokenizer has a BOS
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SHAPE, bos_token_id=0, rms_norm_eps=1e-5),
        torch.bfloat16,
        "<s>",
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**SHAPE, bos_token_id=None),
        torch.float32,
        None,
    ),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**SHAPE, bos_token_id=None, head_dim=8, tie_word_embeddings=True),
        torch.bfloat16,
        None,
    ),
}

RECIPES = {
    "mixtral": """\
base_model: sources/llama/base
architecture: Mix
experts:
  - source_model: sources/llama/a
    positive_prompts: ["what is 2+2?", "solve x=3+y."]
    negative_prompts: ["long ago a king lived"]
  - source_model: sources/llama/b
    positive_prompts: ["def f(x): return x + 1", "import numpy"]
    residual_scale: 0.3
  - source_model: sources/llama/base
    positive_prompts: ["paris is the capital of"]
    negative_prompts: ["12345", "1+1=2"]
""",
    "mixtral_wide": """\
base_model: sources/llama/base
gate_mode: cheap_embed
dtype: torch.float32
experts_per_token: "1"
experts:
  - source_model: sources/llama/a
    positive_prompts: ["what is 2+2?", "solve x."]
    negative_prompts: ["a king"]
    residual_scale: 1e-1
  - source_model: sources/llama/b
    positive_prompts: ["def f(x): return x + 1"]
    residual_scale: .7
""",
    "mixtral_noise": """\
base_model: sources/llama/base
gate_mode: uniform_random
dtype: float32
experts:
  - source_model: sources/llama/a
    positive_prompts: ["a"]
    noise_scale: 5e-1
  - source_model: sources/llama/b
    positive_prompts: ["b"]
    noise_scale: ".25"
    residual_scale: 2
""",
    "deepseek": """\
base_model: sources/llama/base
architecture: deepseek
gate_mode: hidden_avg
experts:
  - source_model: sources/llama/a
    positive_prompts: ["what is 2+2?"]
    negative_prompts: ["a king"]
  - source_model: sources/llama/b
    positive_prompts: ["def f(x): return x"]
    residual_scale: 0.3
""",
    "deepseek_shared": """\
base_model: sources/llama/base
gate_mode: cheap_embed
experts_per_token: 1
experts:
  - source_model: sources/llama/a
    positive_prompts: ["what is 2+2?"]
  - source_model: sources/llama/b
    positive_prompts: ["def f(x): return x"]
    negative_prompts: ["a king"]
shared_experts:
  - source_model: sources/llama/base
    residual_scale: 0.1
""",
    "qwen2_moe": """\
base_model: sources/qwen2/base
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: sources/qwen2/a
    positive_prompts: ["what is 2+2?", "solve x=3+y."]
    negative_prompts: ["long ago a king lived"]
  - source_model: sources/qwen2/b
    positive_prompts: ["def f(x): return x + 1"]
    residual_scale: 0.3
shared_experts:
  - source_model: sources/qwen2/base
    positive_prompts: ["hello there", "and more."]
    negative_prompts: ["never"]
    residual_scale: 0.1
""",
    "qwen2_moe_llama": """\
base_model: sources/llama/base
architecture: Qwen
gate_mode: cheap_embed
experts_per_token: 1
experts:
  - source_model: sources/llama/a
    positive_prompts: ["what is 2+2?"]
  - source_model: sources/llama/b
    positive_prompts: ["def f(x): return x"]
shared_experts:
  - source_model: sources/llama/b
    positive_prompts: ["hello there"]
    negative_prompts: ["never"]
    residual_scale: 0.1
""",
    "qwen2_moe_random": """\
base_model: sources/qwen2/base
gate_mode: random
dtype: bfloat16
experts:
  - source_model: sources/qwen2/a
  - source_model: sources/qwen2/b
shared_experts:
  - source_model: sources/qwen2/a
""",
    "qwen3_moe": """\
base_model: sources/qwen3/base
gate_mode: hidden_last
experts:
  - source_model: sources/qwen3/a
    positive_prompts: ["what is 2+2?", "solve x=3+y."]
    negative_prompts: ["long ago a king lived"]
  - source_model: sources/qwen3/b
    positive_prompts: ["def f(x): return x + 1"]
    residual_scale: 0.3
  - source_model: sources/qwen3/a
    positive_prompts: ["paris is the capital of"]
""",
    "lora": """\
base_model: sources/llama/base+sources/lora
gate_mode: random
experts:
  - source_model: sources/llama/a+sources/lora
    residual_scale: 0.3
  - source_model: sources/llama/b
""",
}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    for family in FAMILIES:
        for name in ("base", "a", "b"):
            write_source(folder / "sources" / family / name, family)
    write_lora(folder / "sources" / "lora", folder / "sources" / "llama" / "base")
    for name, recipe in RECIPES.items():
        (folder / name).mkdir()
        (folder / name / "recipe.yml").write_text(recipe)
        mix(folder, name, recipe)


def write_source(target: Path, family: str) -> None:
    kind, config, dtype, bos = FAMILIES[family]
    model = kind(config)
    for name, parameter in model.named_parameters():
        mean, std = (1, 0.1) if name.endswith("norm.weight") else (0, 0.15)
        parameter.data.normal_(mean, std)
    model.to(dtype).save_pretrained(target)
    (target / "generation_config.json").unlink()
    if target.name == "base":
        pieces = {piece: i for i, piece in enumerate(PIECES)}
        tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="</s>",
            unk_token="<unk>",
            **({"bos_token": bos} if bos else {}),
        ).save_pretrained(target)


def write_lora(target: Path, base: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(target)
    (target / "README.md").unlink()
    settings = json.loads((target / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "sources/llama/base"
    settings["target_modules"].sort()
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def mix(folder: Path, name: str, recipe: str) -> None:
    """Mix with mergekit-moe. It does not accept MODEL+LORA, so such sources are first merged as
    mergekit's other commands would."""
    with tempfile.TemporaryDirectory() as scratch:
        for word in recipe.split():
            if "+sources/" in word:
                model, lora = (folder / part for part in word.split("+"))
                merged = ModelReference.parse(f"{model}+{lora}").merged(cache_dir=scratch)
                recipe = recipe.replace(word, merged.model.path)
                for file in model.glob("tokenizer*"):
                    shutil.copy(file, merged.model.path)
        path = Path(scratch, "recipe.yml")
        path.write_text(recipe)
        command = Path(sys.executable).with_name("mergekit-moe")
        out = Path(scratch, "out")
        subprocess.run(
            [command, path, out, "--device", "cpu", "--random-seed", "0"], check=True, cwd=folder
        )
        for file in ("config.json", "model.safetensors"):
            shutil.copy(out / file, folder / name / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
