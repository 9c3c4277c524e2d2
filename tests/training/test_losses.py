import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.models.layers import Readout
from btx_jax.training.losses import cross_entropy, next_token_targets, token_nll
from tests import reference


@pytest.mark.parametrize("readout", [Readout(), Readout(6.0), Readout(0.5, 3.0)])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_cross_entropy_equals_the_whole_array_in_value_and_gradients(chunk, readout):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (3, 24, 16)), jax.random.normal(keys[1], (16, 50))
    targets = jax.random.randint(keys[2], (3, 24), 0, 50)
    weights = jax.random.bernoulli(keys[3], 0.7, (3, 24))
    fast = lambda h, w: cross_entropy(h, w, targets, weights, chunk, readout) * 0.3  # noqa: E731
    slow = lambda h, w: reference.cross_entropy(h, w, targets, weights, *readout) * 0.3  # noqa: E731
    np.testing.assert_allclose(fast(hidden, head), slow(hidden, head), rtol=1e-5)
    grads = [jax.grad(f, argnums=(0, 1))(hidden, head) for f in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(
        (token_nll(hidden, head, targets, chunk, readout) * weights).sum() * 0.3,
        slow(hidden, head),
        rtol=1e-5,
    )


def test_targets_stay_within_their_document_and_leave_out_padding():
    tokens = jnp.array([[1, 10, 11, 2, 1, 20, 0, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    inputs, input_segments, targets, mask = next_token_targets(tokens, segments)
    assert inputs.tolist() == [[1, 10, 11, 2, 1, 20, 0]]
    assert input_segments.tolist() == [[1, 1, 1, 1, 2, 2, 0]]
    assert targets[mask].tolist() == [10, 11, 2, 20], (
        "not the next document's first token, and no padding"
    )


def test_uniform_logits_cost_log_v():
    nll = token_nll(jnp.zeros((1, 4, 8)), jnp.ones((8, 256)), jnp.zeros((1, 4), jnp.int32), 2)
    np.testing.assert_allclose(nll, np.log(256), rtol=1e-6)
