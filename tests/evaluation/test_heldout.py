import dataclasses
import math

import jax
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.evaluation.heldout import make_heldout_step, mean_loss, token_losses
from btx_jax.evaluation.routing import summarise
from btx_jax.models.llama import Llama, init_params, logits
from tests.models.test_llama import MOE, TINY

COMPUTE = ComputeConfig(
    dtype="float32", remat="none", capacity_factor=0.5, group_size=8, loss_chunk=16
)


def rows_of(rows=5, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 64, (rows, length + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 9:] = 2
    segments[4, 6:] = 0
    tokens[0, 5] = tokens[2, 0] = 2  # 2 is EOS: once as a target, once not
    return {"tokens": tokens, "segments": segments, "bytes": np.full(rows, 30, np.int32)}


@pytest.mark.parametrize("model", [TINY, MOE], ids=["dense", "moe"])
def test_heldout_loss_is_the_mean_over_targets_and_padding_counts_nothing(model, one_device):
    params = init_params(model, jax.random.key(0))
    rows = rows_of()
    step = make_heldout_step(model, COMPUTE, one_device)
    losses, sums, _ = token_losses(step, params, rows, 2, one_device)
    got = mean_loss(losses, rows, 2)
    nll, text, count = 0.0, 0.0, 0
    dropless = dataclasses.replace(COMPUTE, dispatch="ragged")
    routed = []
    whole = jax.jit(Llama(model, dropless, keep_choices=True).apply)
    for row in range(5):
        batch = {name: values[row : row + 1] for name, values in rows.items()}
        hidden, stats = whole(
            {"params": params}, batch["tokens"][:, :-1], batch["segments"][:, :-1]
        )
        routed.append(stats)
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
    if model.moe is None:
        assert sums is None
        return
    found = summarise(sums)
    index = np.concatenate(
        [stats["layers_0"].choice.index_GSK[:, 0] for stats in routed], axis=1
    )  # [L, tokens, K]
    gate = np.concatenate([stats["layers_0"].choice.gate_GSK[:, 0] for stats in routed], axis=1)
    for layer in range(3):
        valid = index[layer][index[layer][:, 0] < 4]
        assert len(valid) == 4 * 16 + 6
        np.testing.assert_allclose(
            found["load"][layer], np.bincount(valid.ravel(), minlength=4) / valid.size, atol=1e-6
        )
        weights = [gate[layer][index[layer] == expert].sum() / len(valid) for expert in range(4)]
        np.testing.assert_allclose(found["gate_load"][layer], weights, atol=1e-6)
        pairs = [
            [np.mean((valid[:, 0] == a) & (valid[:, 1] == b)) for b in range(4)] for a in range(4)
        ]
        np.testing.assert_allclose(found["pairs"][layer], pairs, atol=1e-6)


def test_no_target_gives_no_loss(one_device):
    rows = {name: values[:0] for name, values in rows_of().items()}
    step = make_heldout_step(TINY, COMPUTE, one_device)
    losses, *_ = token_losses(step, init_params(TINY, jax.random.key(0)), rows, 2, one_device)
    assert losses.shape == (0, 16)
    assert mean_loss(losses, rows, 2) is None
