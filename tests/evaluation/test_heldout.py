import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config import ComputeConfig
from btx_jax.evaluation.heldout import heldout_loss, make_heldout_step
from btx_jax.evaluation.sampling import generate, sample_token
from btx_jax.models.llama import Llama, init_params, logits
from tests.models.test_llama import MOE, TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", capacity_factor=0.5, group_size=8, loss_chunk=16)


def batches(rows=5, batch=2, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 64, (rows, length + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 9:] = 2
    segments[4, 6:] = 0
    tokens[0, 5] = tokens[2, 0] = 2  # 2 is EOS; one as a target, one not
    size = np.full(rows, 30, np.int32)
    for start in range(0, rows, batch):
        part = [
            np.concatenate([a[start : start + batch], np.zeros_like(a[: max(0, start + batch - rows)])]) for a in (tokens, segments, size)
        ]
        yield dict(zip(("tokens", "segments", "bytes"), part, strict=True))


@pytest.mark.parametrize("model", [TINY, MOE], ids=["dense", "moe"])
def test_heldout_loss_is_the_mean_over_targets_and_padding_counts_nothing(model, one_device):
    params = init_params(model, jax.random.key(0))
    step = make_heldout_step(model, COMPUTE, one_device, 2, 16, 2)
    got = heldout_loss(step, params, batches(), one_device)
    nll, text, count = 0.0, 0.0, 0
    dropless = dataclasses.replace(COMPUTE, dispatch="ragged")
    for batch in batches(batch=1):
        hidden, _ = Llama(model, dropless).apply({"params": params}, batch["tokens"][:, :-1], batch["segments"][:, :-1])
        log_p = jax.nn.log_softmax(logits(params, hidden))
        for t in range(16):
            a, b = batch["segments"][0, t : t + 2]
            if a == b and a > 0:
                value = -float(log_p[0, t, batch["tokens"][0, t + 1]])
                nll, count = nll + value, count + 1
                text += value * (batch["tokens"][0, t + 1] != 2)
    assert got.tokens == count == 4 * 16 + 5 - 1
    assert got.nats_per_token == pytest.approx(nll / count, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(text / math.log(2) / 150, rel=1e-5)
    assert np.shape(got.load) == ((3, 4) if model.moe else (0,))
    for layer in got.load:
        assert sum(layer) == pytest.approx(1, abs=1e-6)


def test_no_target_gives_no_loss(one_device):
    step = make_heldout_step(TINY, COMPUTE, one_device, 2, 16, 2)
    assert heldout_loss(step, init_params(TINY, jax.random.key(0)), [], one_device) is None


def test_sampling_is_greedy_at_zero_and_keeps_the_nucleus():
    values = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draw = jax.jit(jax.vmap(lambda key, p: sample_token(values, key, 1.0, p), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 4000)
    assert int(sample_token(values, keys[0], 0.0, 1.0)) == 0
    assert set(np.array(draw(keys, 0.7)).tolist()) == {0, 1}, "0.5 alone is short of 0.7, 0.5 + 0.3 reaches it"
    shares = np.bincount(np.array(draw(keys, 1.0)), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_generation_repeats_and_stops_before_eos():
    params = init_params(MOE, jax.random.key(0))
    a = generate(MOE, params, [5, 6, 7], 8, temperature=1.0, seed=3)
    assert a == generate(MOE, params, [5, 6, 7], 8, temperature=1.0, seed=3)
    assert a != generate(MOE, params, [5, 6, 7], 8, temperature=1.0, seed=4)
    greedy = generate(MOE, params, [5, 6, 7], 8)
    assert len(greedy) == 8
    assert generate(MOE, params, [5, 6, 7], 8, eos=greedy[3]) == greedy[: greedy.index(greedy[3])]
