"""Next-token cross-entropy without a [tokens, vocabulary] array. Shape legend: models/layers.py."""

from functools import partial

import jax
import jax.numpy as jnp

from btx_jax.parallel.sharding import RULES, shard


def next_token_targets(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Packed rows [B, T + 1] -> (inputs, input segments, targets, target mask), each [B, T].

    A target counts when it continues its own document: not across a document border, not in padding (segment 0).
    """
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return tokens[:, :-1], segments[:, :-1], tokens[:, 1:], mask


def _positions_per_chunk(targets_BT: jax.Array, chunk: int) -> int:
    """The largest divisor of length such that a device's share of [batch, positions] holds about `chunk` tokens at most."""
    mesh = jax.sharding.get_abstract_mesh()
    batch, length = targets_BT.shape
    shards = 1
    for axis in RULES["batch"] or ():
        shards *= 1 if mesh.empty else mesh.shape[axis]
    wanted = max(1, min(length, chunk * shards // batch))
    return next(n for n in range(wanted, 0, -1) if length % n == 0)


def _chunks(x: jax.Array, positions: int) -> jax.Array:
    """[B, T, ...] -> [T / positions, B, positions, ...]: cut along the sequence, so that every chunk is on all devices."""
    return x.reshape(x.shape[0], -1, positions, *x.shape[2:]).swapaxes(0, 1)


def _logits(h_BCD: jax.Array, head_DV: jax.Array) -> jax.Array:
    flat = jnp.matmul(h_BCD.reshape(-1, h_BCD.shape[-1]), head_DV, preferred_element_type=jnp.float32)
    return shard(flat.reshape(*h_BCD.shape[:2], -1), "batch", None, "vocab")


def token_nll(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
    """-log p(target) in nats, [B, T], float32. `chunk`: tokens per device whose logits exist at one time."""
    positions = _positions_per_chunk(targets_BT, chunk)
    head_DV = head_DV.astype(hidden_BTD.dtype)

    def body(_, xs):
        h_BCD, y_BC = xs
        logits = _logits(h_BCD, head_DV)
        return None, jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y_BC[..., None], axis=-1)[..., 0]

    _, nll = jax.lax.scan(body, None, (_chunks(hidden_BTD, positions), _chunks(targets_BT, positions)))
    return nll.swapaxes(0, 1).reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int) -> jax.Array:
    """Sum of weights * -log p(target), nats. Differentiable in hidden and head.

    The forward pass computes the gradient of each chunk while its logits exist: three matmuls with the head in all, none twice.
    """
    return (token_nll(hidden_BTD, head_DV, targets_BT, chunk) * weights_BT).sum()


def _forward(hidden_BTD, head_DV, targets_BT, weights_BT, chunk):
    positions = _positions_per_chunk(targets_BT, chunk)
    dtype, d_model = hidden_BTD.dtype, hidden_BTD.shape[-1]
    head = head_DV.astype(dtype)

    def body(carry, xs):
        loss, dhead_DV = carry
        h_BCD, y_BC, w_BC = xs
        logits = _logits(h_BCD, head)
        peak = logits.max(axis=-1, keepdims=True)
        exp = jnp.exp(logits - peak)
        total = exp.sum(axis=-1, keepdims=True)
        nll_BC = (jnp.log(total) + peak)[..., 0] - jnp.take_along_axis(logits, y_BC[..., None], axis=-1)[..., 0]
        one_hot = y_BC[..., None] == jnp.arange(logits.shape[-1])
        dlogits = ((exp / total - one_hot) * w_BC[..., None]).astype(dtype).reshape(-1, logits.shape[-1])
        dh_BCD = (dlogits @ head.T).reshape(h_BCD.shape)
        dhead_DV += jnp.matmul(h_BCD.reshape(-1, d_model).T, dlogits, preferred_element_type=jnp.float32)
        return (loss + (nll_BC * w_BC).sum(), dhead_DV), dh_BCD

    xs = tuple(_chunks(x, positions) for x in (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    zero = (jnp.zeros((), jnp.float32), jnp.zeros(head_DV.shape, jnp.float32))
    (loss, dhead_DV), dh = jax.lax.scan(body, zero, xs)
    return loss, (dh.swapaxes(0, 1).reshape(hidden_BTD.shape), dhead_DV.astype(head_DV.dtype))


def _backward(chunk, residuals, g):
    dh, dhead = residuals
    return dh * g.astype(dh.dtype), dhead * g, None, None


cross_entropy.defvjp(_forward, _backward)
