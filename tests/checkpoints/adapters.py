"""Adapter directories with random experts, and the logits of a directory, for tests of adapters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from btx_jax.checkpoints.adapter import to_tensors, write_directory
from btx_jax.checkpoints.checkpoint import base_of, find_checkpoint, load_params
from btx_jax.checkpoints.training_state import CheckpointMetadata
from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LoRAConfig
from btx_jax.models.llama import Llama, init_params, logits

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "llama"


def logits_of(path, tokens):
    found = find_checkpoint(path)
    params, model = load_params(found), found.metadata.model
    llama = Llama(model, ComputeConfig(dtype="float32", remat="none", dispatch="ragged"))
    return np.asarray(
        jax.jit(lambda p: logits(p, llama.apply({"params": p}, tokens, np.ones_like(tokens))[0]))(
            params
        )
    )


def mola_directory(folder, seed=0, base=BASE, **lora):
    """An adapter directory with random experts."""
    under = find_checkpoint(base)
    model = dataclasses.replace(
        under.metadata.model, lora=LoRAConfig(**({"allocation": "2,3,2", "rank": (4,)} | lora))
    )
    tensors = to_tensors(model, init_params(model, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.2, x.shape).astype(np.float32) if name.endswith(".b") else x
        for name, x in tensors.items()
    }
    folder.mkdir()
    kept = under.metadata.huggingface
    write_directory(folder, CheckpointMetadata(model, 0, {}, base_of(under), kept), tensors)
    return folder
