"""Our export of every kind of model, with random weights and our logits, for transformers_peer.py
releases:

    python -m tests.checkpoints.exports FOLDER
"""

import sys
from pathlib import Path

import jax
import numpy as np

from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, write_checkpoint
from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig, MoEConfig, RopeScaling
from btx_jax.models.llama import Llama, logits

MOE = {"moe": MoEConfig((4, 4))}
LINEAR, LLAMA3 = RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
KINDS = {
    "llama": {},
    "llama_tied": {"tied_head": True},
    "llama_theta": {"rope_theta": 5e5},
    "llama_linear": {"rope_scaling": LINEAR},
    "llama_llama3": {"rope_scaling": LLAMA3},
    "llama_head_dim": {"head_dim": 16},
    "llama_odd_width": {"d_model": 30},
    "mixtral": MOE,
    "mixtral_tied": MOE | {"tied_head": True},
    "mixtral_theta": MOE | {"rope_theta": 5e5},
    "mixtral_linear": MOE | {"rope_scaling": LINEAR},
    "mixtral_llama3": MOE | {"rope_scaling": LLAMA3},
    "mixtral_head_dim": MOE | {"head_dim": 16},
    "mixtral_top1": {"moe": MoEConfig((4, 4), k=1)},
    "mixtral_soft": {"moe": MoEConfig((4, 4), routing="soft")},
}


def write(name: str, directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Write an export; returns its logits."""
    usual = {"d_model": 32, "head_dim": 8, "norm_eps": 1e-6, "context": 512}
    model = ModelConfig(61, 2, d_ff=48, heads=4, kv_heads=2, **usual | KINDS[name])
    rng = np.random.default_rng(1)
    write_checkpoint(
        directory,
        True,
        model,
        dict.fromkeys(slots(model), np.dtype(np.float32)),
        lambda name: rng.normal(0, 0.15, slots(model)[name].shape).astype(np.float32),
        None,
        history={},
        huggingface={},
        card="",
        check=lambda: None,
        verb=name,
    )
    params = load_params(find_checkpoint(directory))
    compute = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    apply = jax.jit(Llama(model, compute).apply)
    hidden, _ = apply({"params": params}, tokens, np.ones_like(tokens))
    return np.asarray(logits(params, hidden))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 61, (1, 300)).astype(np.int32)
    np.save(folder / "tokens.npy", tokens)
    for name in KINDS:
        np.save(folder / f"{name}.npy", write(name, folder / name, tokens))
