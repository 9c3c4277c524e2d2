"""Smaller experts: a feed-forward block cut along d_ff (BTX section 4.4, "split")."""

from collections.abc import Mapping

import jax


def split_ffn(ffn: Mapping[str, jax.Array], chunks: int) -> dict[str, jax.Array]:
    """{gate, up: [L, D, F], down: [L, F, D]} -> {gate, up: [L, C, D, F / C], down: [L, C, F / C, D]}.

    SwiGLU acts on each hidden unit alone, so the outputs of all C chunks, each at weight 1, add up to the block's.
    Raises ValueError when chunks does not divide F.
    """
    hidden = ffn["gate"].shape[-1]
    if hidden % chunks:
        raise ValueError(f"d_ff={hidden} is not divisible into {chunks} chunks")

    def cut(name: str, leaf: jax.Array) -> jax.Array:
        if name == "down":
            return leaf.reshape(leaf.shape[0], chunks, hidden // chunks, leaf.shape[2])
        return leaf.reshape(*leaf.shape[:2], chunks, hidden // chunks).swapaxes(1, 2)

    return {name: cut(name, leaf) for name, leaf in ffn.items()}
