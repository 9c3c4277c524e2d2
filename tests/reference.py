"""The slow, obvious twin of every fast path. Not used by the package."""

import jax
import jax.numpy as jnp
import numpy as np


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def loop_over_experts(x_MD, gate_MK, index_MK, gate_EDF, up_EDF, down_EFD):
    """Apply every expert to every token, weighted by its gate (zero where not chosen)."""
    y_MD = jnp.zeros_like(x_MD)
    for e in range(gate_EDF.shape[0]):
        weight_M = (gate_MK * (index_MK == e)).sum(-1)
        y_MD += weight_M[:, None] * swiglu(x_MD, gate_EDF[e], up_EDF[e], down_EFD[e])
    return y_MD


def attention(q_BHTK, k_BNTK, v_BNTK, segments_BT):
    """Softmax over every permitted key, one query head at a time. Query head i uses key head i //
    (H / N)."""
    heads, length = q_BHTK.shape[1], q_BHTK.shape[2]
    share = heads // k_BNTK.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool)) & (
        segments_BT[:, :, None] == segments_BT[:, None, :]
    )
    out = []
    for h in range(heads):
        scores = jnp.einsum("btk,bsk->bts", q_BHTK[:, h], k_BNTK[:, h // share]) / np.sqrt(
            q_BHTK.shape[-1]
        )
        out.append(
            jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1) @ v_BNTK[:, h // share]
        )
    return jnp.stack(out, axis=1)


def cross_entropy(hidden, head, targets, weights, divisor=1.0, cap=0.0):
    logits = hidden @ head / divisor
    log_p = jax.nn.log_softmax(cap * jnp.tanh(logits / cap) if cap else logits, axis=-1)
    return -(jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0] * weights).sum()


def lora_experts(x_MI, a_IER, b_ERO, router_IE, k, scale):
    """MoLA's equation, one expert after another: the experts' contribution to a linear map's
    output."""
    probs = (
        jax.nn.softmax(x_MI @ router_IE)
        if router_IE is not None
        else jnp.ones((len(x_MI), 1), x_MI.dtype)
    )
    kept = jnp.zeros_like(probs)
    for m in range(len(x_MI)):
        best = sorted(
            range(probs.shape[1]), key=lambda e: -float(jax.lax.stop_gradient(probs)[m, e])
        )[:k]
        total = sum(probs[m, e] for e in best)
        for e in best:
            kept = kept.at[m, e].set(probs[m, e] / total)
    y = jnp.zeros((len(x_MI), b_ERO.shape[-1]), x_MI.dtype)
    for e in range(a_IER.shape[1]):
        y += kept[:, e : e + 1] * scale * (x_MI @ a_IER[:, e]) @ b_ERO[e]
    return y
