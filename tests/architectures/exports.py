"""Exports for transformers to read, each with our logits: of every golden checkpoint (with greedy
tokens), for `peer.py table`; and mixtures of every dense one, for `peer.py mixtures`:

    python -m tests.architectures.exports FOLDER [NAME ...]
    python -m tests.architectures.exports mixtures FOLDER [NAME ...]
"""

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import yaml
from safetensors.numpy import save_file

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.commands import convert, mix
from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.evaluation.generation import Generator
from btx_jax.models.layers import Readout
from btx_jax.models.llama import Llama, Params, logits
from btx_jax.parallel.sharding import make_mesh
from tests.architectures import goldens

COMPUTE = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")


@functools.lru_cache(maxsize=1)
def load(directory: Path) -> tuple[ModelConfig, Params]:
    found = find_checkpoint(directory)
    return found.metadata.model, load_params(found)


def our_logits(model: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits of the first row, [kept positions, V]."""
    hidden, _ = jax.jit(Llama(model, COMPUTE).apply)(
        {"params": params}, tokens, np.ones_like(tokens)
    )
    return np.asarray(logits(params, hidden, Readout.of(model)))[
        0, goldens.positions(tokens.shape[1])
    ]


def our_tokens(
    model: ModelConfig, params: Params, saved: Mapping[str, np.ndarray]
) -> list[list[int]]:
    """The greedy continuation of each golden prompt: in one batch, or separately for longrope,
    where transformers lets the longest row choose the factors of every row."""
    prompts = [prompt for prompt, _ in goldens.prompts(saved)]
    batches = [[prompt] for prompt in prompts] if "short_logits" in saved else [prompts]
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    generator = Generator(model, params, COMPUTE, mesh)
    return [ids for batch in batches for ids in generator.generate(batch, goldens.NEW_TOKENS)]


def write(name: str, directory: Path) -> None:
    """Write an export that has passed through a run of ours."""
    with tempfile.TemporaryDirectory() as home:
        convert.run(str(goldens.FOLDER / name), f"{home}/ours")
        convert.run(f"{home}/ours", str(directory))
        model, params = load(Path(home) / "ours")
    saved = goldens.expected(name)
    np.save(directory / "logits.npy", our_logits(model, params, saved["tokens"]))
    np.save(directory / "generated.npy", np.array(our_tokens(model, params, saved), np.int32))


def dense_names() -> list[str]:
    return [
        name
        for name in goldens.names()
        if find_checkpoint(goldens.FOLDER / name).metadata.model.moe is None
    ]


def write_variant(
    name: str, directory: Path, seed: int = 0, noise: float = 0.0, without: tuple[str, ...] = ()
) -> str:
    """Write a golden checkpoint with noise, relative to each tensor, and without the biases of
    these modules, such as mlp."""
    shutil.copytree(goldens.FOLDER / name, directory)
    rng = np.random.default_rng(seed)
    tensors = {
        key: (
            tensor.astype(np.float32)
            + noise
            * tensor.astype(np.float32).std()
            * rng.standard_normal(tensor.shape, np.float32)
        ).astype(tensor.dtype)
        for key, tensor in goldens.tensors(directory).items()
        if not (key.endswith(".bias") and any(f".{part}." in key for part in without))
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    keys = {"mlp": ("mlp_bias", "bias", "use_bias"), "self_attn": ("attention_bias", "qkv_bias")}
    config = json.loads((directory / "config.json").read_text())
    config |= {key: False for part in without for key in keys[part] if key in config}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def write_mixture(
    sources: list[str], directory: Path, *, output_format: str = "", **changes: object
) -> Path:
    """Write a verified mixture with random routers, by a recipe whose base is the first source."""
    recipe = {
        "base_model": sources[0],
        "gate_mode": "random",
        "experts": [{"source_model": source} for source in sources],
    }
    path = directory.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe | changes))
    mix.run(str(path), str(directory), verify=True, output_format=output_format)
    return directory


def write_mixtures(name: str, folder: Path) -> None:
    """Write folder/dense and mixtures of it: folder/equal with four equal experts, top-2;
    folder/different of three perturbed copies; and, where Qwen2-MoE can hold it, folder/shared with
    a shared expert. Features that no mixture supports are removed from the dense model first.
    float32 is used where norms are folded, as centred weights are not bfloat16 numbers."""
    folder.mkdir(parents=True)
    model = find_checkpoint(goldens.FOLDER / name).metadata.model
    without = ("mlp", "self_attn") if "up" in model.biases else ()
    dtype = "float32" if model.norm == "layer" else ""
    dense = write_variant(name, folder / "dense", without=without)
    noisy = [write_variant(name, folder / f"source{seed}", seed, 0.3, without) for seed in range(3)]
    write_with_logits(name, [dense] * 4, folder / "equal", dtype=dtype)
    write_with_logits(name, noisy, folder / "different", base="average", dtype=dtype)
    shared = {"architecture": "qwen moe", "shared_experts": [{"source_model": dense}]}
    try:
        write_with_logits(name, noisy, folder / "shared", dtype=dtype, **shared)
    except UserError as error:
        print(f"{name} with a shared expert: {error}")


def write_with_logits(name: str, sources: list[str], directory: Path, **changes: object) -> None:
    write_mixture(sources, directory, **changes)
    tokens = goldens.expected(name)["tokens"]
    np.save(directory / "logits.npy", our_logits(*load(directory), tokens))


if __name__ == "__main__":
    is_mixtures = sys.argv[1] == "mixtures"
    folder, *chosen = sys.argv[2 if is_mixtures else 1 :]
    Path(folder).mkdir(parents=True)
    for name in chosen or (dense_names() if is_mixtures else goldens.names()):
        try:
            (write_mixtures if is_mixtures else write)(name, Path(folder) / name)
        except UserError as error:
            print(f"{name}: {error}")
