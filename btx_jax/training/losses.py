"""Next-token cross-entropy without a [tokens, vocabulary] array. Shape legend: models/layers.py."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.models.layers import Readout
from btx_jax.parallel.sequence import TOKENS
from btx_jax.parallel.sharding import all_gather, axis_index, pmax, psum, shard_map

Array = TypeVar("Array", jax.Array, np.ndarray)


def next_token_targets(tokens: Array, segments: Array) -> tuple[Array, Array, Array, Array]:
    """Packed rows [B, T + 1] -> (inputs, input segments, targets, target mask), each [B, T].

    The mask is true where the target belongs to the same document as its input. It is false across
    documents, in padding (segment 0), and where the target's segment is negative, which marks text
    that is attended to but not learnt. The input segments returned are absolute values.
    """
    document = abs(segments)
    mask = (document[:, 1:] == document[:, :-1]) & (segments[:, 1:] > 0)
    return tokens[:, :-1], document[:, :-1], tokens[:, 1:], mask


def _positions_per_chunk(targets_BT: jax.Array, chunk: int) -> int:
    """The largest divisor of T for which [B, divisor] holds at most `chunk` tokens; at least 1."""
    batch, length = targets_BT.shape
    wanted = max(1, min(length, chunk // batch))
    return next(n for n in range(wanted, 0, -1) if length % n == 0)


def _chunks(x: jax.Array, positions: int) -> jax.Array:
    """Split along the sequence: [B, T, ...] -> [T / positions, B, positions, ...]."""
    return x.reshape(x.shape[0], -1, positions, *x.shape[2:]).swapaxes(0, 1)


def _log_softmax_parts(h_BCD: jax.Array, head_DV: jax.Array, y_BC: jax.Array, readout: Readout):
    """Return (nll [B, C], exp(logits - peak) [B, C, V], its sum over the whole vocabulary
    [B, C, 1], one-hot targets [B, C, V], logits [B, C, V]) on one device, where V may be only a
    shard of the vocabulary."""
    products = jnp.matmul(
        h_BCD.reshape(-1, h_BCD.shape[-1]), head_DV, preferred_element_type=jnp.float32
    )
    logits = readout.logits(products.reshape(*h_BCD.shape[:2], -1))
    peak = pmax(logits.max(axis=-1, keepdims=True), "vocab")
    exp = jnp.exp(logits - peak)
    total = psum(exp.sum(axis=-1, keepdims=True), "vocab")
    first = axis_index("vocab") * logits.shape[-1]
    one_hot = y_BC[..., None] == first + jnp.arange(logits.shape[-1])
    target_BC = psum(jnp.where(one_hot, logits, 0).sum(axis=-1), "vocab")
    return (jnp.log(total) + peak)[..., 0] - target_BC, exp, total, one_hot, logits


HEAD = ("embed", "vocab")


def token_nll(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    readout: Readout = Readout(),
) -> jax.Array:
    """-log p(target) in nats, [B, T], float32.

    chunk: tokens per device whose logits are held at once. readout: how the model turns the head's
    matmul output into logits.
    """
    return token_scores(hidden_BTD, head_DV, targets_BT, chunk, readout)[0]


def token_scores(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    readout: Readout = Readout(),
) -> tuple[jax.Array, jax.Array]:
    """(-log p(target) in nats, whether the target is the most likely token), each [B, T]."""

    def local(hidden_BTD, head_DV, targets_BT):
        head = all_gather(head_DV, "embed", axis=0)
        positions = _positions_per_chunk(targets_BT, chunk)

        def body(_, xs):
            nll_BC, exp, _, one_hot, _ = _log_softmax_parts(xs[0], head, xs[1], readout)
            return None, (
                nll_BC,
                psum(jnp.where(one_hot, exp, 0).sum(axis=-1), "vocab") == 1,
            )

        _, scores = jax.lax.scan(
            body, None, (_chunks(hidden_BTD, positions), _chunks(targets_BT, positions))
        )
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(targets_BT.shape), scores)

    return shard_map(local, (TOKENS, HEAD, TOKENS), (TOKENS, TOKENS))(
        hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    readout: Readout = Readout(),
) -> jax.Array:
    """Sum of weights * -log p(target) in nats. Differentiable with respect to hidden and head.

    The forward pass computes each chunk's gradient while its logits are held, so there are three
    matmuls with the head in all and none is repeated. Each device accumulates its share of the
    head's gradient in float32 over all chunks; it is reduced across devices once, in the dtype of
    the matmuls.
    """
    return (token_nll(hidden_BTD, head_DV, targets_BT, chunk, readout) * weights_BT).sum()


def _forward(hidden_BTD, head_DV, targets_BT, weights_BT, chunk, readout):
    def local(hidden_BTD, head_DV, targets_BT, weights_BT):
        dtype, d_model = hidden_BTD.dtype, hidden_BTD.shape[-1]
        head, gather_transposed = jax.vjp(lambda w: all_gather(w, "embed", axis=0), head_DV)
        positions = _positions_per_chunk(targets_BT, chunk)

        def body(dhead_DV, xs):
            h_BCD, y_BC, w_BC = xs
            nll_BC, exp, total, one_hot, logits = _log_softmax_parts(h_BCD, head, y_BC, readout)
            dlogits = (exp / total - one_hot) * w_BC[..., None]
            dproducts = readout.pulled(logits, dlogits).astype(dtype).reshape(-1, head.shape[-1])
            dh_BCD = psum((dproducts @ head.T).reshape(h_BCD.shape), "vocab")
            dhead_DV += jnp.matmul(
                h_BCD.reshape(-1, d_model).T, dproducts, preferred_element_type=jnp.float32
            )
            return dhead_DV, ((nll_BC * w_BC).sum(axis=1), dh_BCD)

        xs = tuple(
            _chunks(x, positions) for x in (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32))
        )
        dhead_DV, (loss_NB, dh) = jax.lax.scan(body, jnp.zeros(head.shape, jnp.float32), xs)
        (dhead_DV,) = gather_transposed(dhead_DV.astype(dtype))
        return (
            psum(loss_NB.sum(axis=0), "sequence"),
            dh.swapaxes(0, 1).reshape(hidden_BTD.shape),
            psum(dhead_DV, "replica"),
        )

    names = (TOKENS, HEAD, TOKENS, TOKENS)
    compute = shard_map(local, names, (("batch",), TOKENS, HEAD))
    loss_B, dh, dhead_DV = compute(
        hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, weights_BT
    )
    return loss_B.sum(), (dh, dhead_DV.astype(head_DV.dtype))


def _backward(chunk, readout, residuals, g):
    dh, dhead = residuals
    return dh * g.astype(dh.dtype), dhead * g.astype(dhead.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
