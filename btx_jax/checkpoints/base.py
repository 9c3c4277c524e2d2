"""Digest of the parameters that a checkpoint leaves to its base, used to identify the base."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from btx_jax.architectures.tensors import TensorId
from btx_jax.checkpoints.training_state import Base
from btx_jax.errors import UserError


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of a tensor's values, as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").data).hexdigest()


def base_digest(hashes: Mapping[TensorId, str]) -> str:
    """Digest of a base, as `checkpoint.load_base` defines it. hashes: `tensor_digest` of each
    tensor."""
    lines = sorted(f"{tensor} {sha256}\n" for tensor, sha256 in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def require_digest(held: Base, digest: str, whose: Path | str) -> None:
    """Raise UserError when the base found now has another digest. held: the base that was found.
    digest: the expected one. whose: the checkpoint that needs the base."""
    if held.digest != digest:
        raise UserError(
            f"{whose}: was trained on a base with digest {digest[:16]}..., but {held.path} has"
            f" {held.digest[:16]}...: the weights differ; restore the original base"
        )
