"""transformers' own results: makes the golden checkpoints of test_huggingface.py, and reads our
exports. From the project's root, as `python -m tests.checkpoints.transformers_peer` and:

    make tests/checkpoints/golden          transformers 5
    directories tests/checkpoints/golden   transformers 5.23: logits of directories.py's kinds
    check EXPORT LOGITS.npy                5 or 4.42, each in its own environment
    releases FOLDER                        any; FOLDER was made by exports.py
    parity DIR README.md                   any checkpoint: our logits against transformers'

Needs torch and transformers (`pip install -e '.[bench]'`; for 4.42 `pip install torch
'transformers==4.42.4' 'numpy<2'`). `check` fails on any missing or unexpected key, and when logits
differ by more than 1e-4. `releases` was run with 4.42.4, 4.43.4, 4.45.2, 4.47.1, 4.57.3, 5.0.0 and
5.23.0: every export gives the same logits, or is refused by a release before the one named in its
config.json.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

LENGTH = 512
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    "rope_theta": 5e5,
}  # fmt: skip


def models():
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    yield "llama", LlamaForCausalLM(LlamaConfig(**SHAPE))
    yield (
        "llama_gqa_llama3",
        LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3)
        ),
    )
    yield (
        "llama_linear_tied",
        LlamaForCausalLM(
            LlamaConfig(
                **SHAPE,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            )
        ),
    )
    yield (
        "mistral",
        MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None)),
    )
    yield (
        "mixtral",
        MixtralForCausalLM(
            MixtralConfig(
                **SHAPE,
                num_key_value_heads=2,
                num_local_experts=3,
                num_experts_per_tok=2,
                sliding_window=None,
            )
        ),
    )


def make(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    for name, model in models():
        model = model.float().eval()
        for (
            parameter
        ) in model.parameters():  # larger than at initialisation, to expose a wrong layout
            (
                parameter.data.normal_(0, 0.12)
                if parameter.dim() > 1
                else parameter.data.normal_(1, 0.1)
            )
        tokens = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH))
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(
            folder / name, max_shard_size="60KB" if name == "llama_gqa_llama3" else "5GB"
        )
        with torch.no_grad():
            logits = model(tokens).logits
        np.savez(
            folder / name / "golden.npz", tokens=tokens.numpy(), logits=logits[0, ::37].numpy()
        )
        if name == "mixtral":  # the layout in memory, written by other tools
            fused = folder / "mixtral_fused"
            shutil.rmtree(fused, ignore_errors=True)
            fused.mkdir()
            from safetensors.torch import save_file

            save_file(
                {key: value.contiguous() for key, value in model.state_dict().items()},
                fused / "model.safetensors",
                {"format": "pt"},
            )
            for file in ("config.json", "golden.npz"):
                shutil.copyfile(folder / name / file, fused / file)


def check(export: Path, golden: Path) -> None:
    """Load an export strictly and compare logits at every 37th position."""
    kind = json.loads((export / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(
        export, torch_dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: list(value) for key, value in info.items() if value}
    assert not wrong, f"transformers {transformers.__version__}: {wrong}"
    saved = np.load(golden)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(saved["tokens"])).logits[0, ::37].numpy()
    difference = float(np.abs(logits - saved["logits"]).max())
    print(
        f"transformers {transformers.__version__}: {kind} loads with no missing or unexpected keys,"
        f" logits within {difference:.1e}"
    )
    assert difference < 1e-4


def releases(folder: Path) -> None:
    """The behaviour of this release on our exports: the same logits, an error, or another model."""
    transformers.logging.set_verbosity_error()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    print(f"transformers {transformers.__version__}")
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        needed = json.loads((path / "config.json").read_text())["transformers_version"]
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, torch_dtype=torch.float32, output_loading_info=True
            )
            with torch.no_grad():
                logits = model.eval()(tokens).logits.numpy()
        except Exception as error:  # any exception is a result
            print(f"{path.name:20} needs {needed:8} raises {type(error).__name__}: {error!s:.60}")
            continue
        theirs = np.load(folder / f"{path.name}.npy")
        wrong = {key: sorted(value)[:2] for key, value in info.items() if value}
        same = np.abs(logits - theirs).max() < 1e-4 and not wrong
        print(f"{path.name:20} needs {needed:8} {'same' if same else f'ANOTHER MODEL {wrong}'}")


def parity(directory: Path, text: Path) -> None:
    """The largest difference of float32 logits over the first 512 tokens of a text."""
    from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
    from btx_jax.config.config import ComputeConfig
    from btx_jax.data.tokenizers import load_tokenizer
    from btx_jax.models.llama import Llama, logits

    found = find_checkpoint(directory)
    ids = np.array([load_tokenizer(found.tokenizer).encode(text.read_text())[:LENGTH]], np.int32)
    params = load_params(found)
    hidden, _ = Llama(
        found.metadata.model, ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    ).apply({"params": params}, ids, np.ones_like(ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    difference = np.abs(np.asarray(logits(params, hidden)) - theirs).max()
    print(
        f"{ids.shape[1]} tokens: logits up to {np.abs(theirs).max():.1f}, largest difference"
        f" {difference:.1e}"
    )


def directories(folder: Path) -> None:
    """Save logits of every kind in directories.TABLE, at every 128th position, as computed by
    transformers 5.23, in FOLDER/directories.npz; print a table of its errors for the others."""
    import tempfile

    from tests.checkpoints.directories import TABLE, write

    transformers.logging.set_verbosity_error()
    tokens = np.load(folder / "llama" / "golden.npz")["tokens"]
    logits = {}
    for name, kind in TABLE.items():
        with tempfile.TemporaryDirectory() as home:
            write(name, Path(home) / "model")
            try:
                model, info = transformers.AutoModelForCausalLM.from_pretrained(
                    Path(home) / "model", dtype=torch.float32, output_loading_info=True
                )
            except Exception as error:  # any exception is a result
                print(f"{name:45} {kind.refusal or 'LOADS HERE':50} raises {error!r:.90}")
                continue
        wrong = {key: sorted(value)[:2] for key, value in info.items() if value}
        with torch.no_grad():
            logits[name] = model.eval()(torch.from_numpy(tokens)).logits[0, ::128].numpy()
        print(f"{name:45} {kind.refusal or 'loads here':50} loads {wrong or ''}")
    loaded = {name: values for name, values in logits.items() if not TABLE[name].refusal}
    np.savez_compressed(folder / "directories.npz", **loaded)


if __name__ == "__main__":
    {
        "directories": lambda: directories(Path(sys.argv[2])),
        "releases": lambda: releases(Path(sys.argv[2])),
        "parity": lambda: parity(Path(sys.argv[2]), Path(sys.argv[3])),
        "make": lambda: make(Path(sys.argv[2])),
        "check": lambda: check(Path(sys.argv[2]), Path(sys.argv[3])),
    }[sys.argv[1]]()
