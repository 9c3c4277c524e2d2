import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LoRAConfig, MoEConfig
from btx_jax.evaluation.generation import Generator, Sampling, sample_token
from btx_jax.models.decoding import empty_cache, forward, next_logits, unstack
from btx_jax.models.llama import Llama, init_params, logits
from btx_jax.parallel.sharding import make_mesh
from tests.models.test_llama import MOE, TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21]]
MIXED = dataclasses.replace(TINY, moe=MoEConfig((0, 4, 2)))
SOFT = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4), routing="soft"))
LORA = dataclasses.replace(
    TINY, lora=LoRAConfig("1,3,3", k=(1, 2, 2), rank=(2,), targets=("q", "o", "up", "down"))
)
TIED = dataclasses.replace(TINY, tied_head=True)
ANCHORED = dataclasses.replace(TINY, moe=MoEConfig((3, 3, 3), anchor=True))
BRANCH = dataclasses.replace(TINY, moe=MoEConfig((1, 1, 1), anchor=True))
TOP1 = dataclasses.replace(TINY, moe=MoEConfig((6, 6, 6), k=1, routing="switch"))


def scaled(model):
    """Random parameters, large enough that greedy decoding does not repeat one token."""

    def larger(path, x):
        return (
            0.5 * jax.random.normal(jax.random.key(2), x.shape)
            if path[-1].key in ("b", "router_bias")
            else x * 6
            if x.ndim > 2
            else x
        )

    return jax.tree_util.tree_map_with_path(larger, init_params(model, jax.random.key(1)))


def without_cache(model, params, prompt, new_tokens):
    """Greedy decoding with a full forward pass for every token."""
    llama, ids = Llama(model, COMPUTE), list(prompt)
    forward = jax.jit(
        lambda tokens, segments: logits(
            params, llama.apply({"params": params}, tokens, segments)[0]
        )
    )
    for _ in range(new_tokens):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(
            int(
                forward(tokens, (np.arange(64) < len(ids)).astype(np.int32)[None])[
                    0, len(ids) - 1
                ].argmax()
            )
        )
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(MIXED, id="dense and mixed layers"),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param(ANCHORED, id="anchored"),
        pytest.param(SOFT, id="soft", marks=pytest.mark.slow),
        pytest.param(TINY, id="dense", marks=pytest.mark.slow),
        pytest.param(MOE, id="moe", marks=pytest.mark.slow),
        pytest.param(TOP1, id="switch", marks=pytest.mark.slow),
        pytest.param(BRANCH, id="branch", marks=pytest.mark.slow),
    ],
)
def test_the_cache_changes_no_token_whatever_shares_the_batch(model, one_device):
    params = scaled(model)
    want = [without_cache(model, params, prompt, 40) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in want}) == len(PROMPTS), (
        "a test that tells nothing: all prompts continue alike"
    )
    generator = Generator(model, params, COMPUTE, one_device)
    assert generator.generate(PROMPTS, 40) == want
    assert generator.generate(PROMPTS, 33) == [ids[:33] for ids in want], (
        "a second look for one token"
    )
    assert [generator.generate([prompt], 40)[0] for prompt in PROMPTS] == want


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (TINY, 1),
        (TINY, 4),
        (MOE, 1),
        (MOE, 4),
        pytest.param(TOP1, 4, marks=pytest.mark.slow),
        (LORA, 4),
        (TIED, 1),
        (ANCHORED, 1),
        pytest.param(ANCHORED, 4, marks=pytest.mark.slow),
        pytest.param(BRANCH, 4, marks=pytest.mark.slow),
    ],
    ids=[
        "dense-1",
        "dense-4",
        "moe-1",
        "moe-4",
        "switch-4",
        "lora-4",
        "tied-1",
        "anchored-1",
        "anchored-4",
        "branch-4",
    ],
)
def test_bfloat16_rounds_and_changes_nothing_else(model, rows, one_device):
    """Compares next-token distributions after a prompt and after one more token with the float32
    model."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), scaled(model))
    ids = np.random.default_rng(0).integers(1, model.vocab_size, (rows, 9)).astype(np.int32)
    hidden = jax.jit(Llama(model, COMPUTE).apply)({"params": params}, ids, np.ones_like(ids))[0]
    want = jax.nn.log_softmax(logits(params, hidden))
    compute = dataclasses.replace(COMPUTE, dtype="bfloat16")
    with jax.set_mesh(one_device):
        weights = jax.jit(lambda params: unstack(params, model, "bfloat16", one_device=True))(
            params
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
            assert (leaf.dtype == jnp.float32) == (
                getattr(path[-1], "key", "") in ("scale", "router", "router_bias")
            ), jax.tree_util.keystr(path)
        step = jax.jit(lambda weights, *args: forward(model, compute, weights, *args))
        read = jax.jit(
            lambda weights, hidden: jax.nn.log_softmax(next_logits(model, weights, hidden))
        )
        cache = empty_cache(model, "bfloat16", rows, 16)
        for tokens, last in ((ids[:, :8], 7), (ids[:, 8:], 8)):
            hidden, cache = step(weights, tokens, np.full(rows, tokens.shape[1], np.int32), cache)
            got = read(weights, hidden)
            signal = want[:, last] - want[:, last].mean(-1, keepdims=True)
            off = np.linalg.norm(got - want[:, last]) / np.linalg.norm(signal)
            assert off < 0.06, (
                "more than rounding: that gives 0.01, and 0.05 where it sends a token to another"
                " expert"
            )


def test_a_mesh_gives_the_same_tokens(one_device):
    params = scaled(MOE)
    mesh = make_mesh((1, 2, 2, 2), jax.devices())
    assert Generator(MOE, params, COMPUTE, mesh).generate(PROMPTS, 12) == Generator(
        MOE, params, COMPUTE, one_device
    ).generate(PROMPTS, 12)


def test_a_row_ends_before_eos_or_when_it_is_finished(one_device):
    params = scaled(MOE)
    free = Generator(MOE, params, COMPUTE, one_device).generate(PROMPTS, 40)
    eos = free[0][5]
    got = Generator(MOE, params, COMPUTE, one_device, stops=[eos]).generate(PROMPTS, 40)
    assert got == [ids[: ids.index(eos)] if eos in ids else ids for ids in free]
    stopped = Generator(MOE, params, COMPUTE, one_device).generate(
        PROMPTS, 40, is_finished=lambda row, ids: row == 2
    )
    assert stopped[2] == free[2][:32], "asked every 32 tokens"
    assert [stopped[i] for i in (0, 1, 3)] == [free[i] for i in (0, 1, 3)]


def test_sampling_repeats_with_its_seed(one_device):
    generator = Generator(MOE, init_params(MOE, jax.random.key(0)), COMPUTE, one_device)
    warm = Sampling(temperature=1.0)
    a = generator.generate(PROMPTS, 8, warm, seed=3)
    assert a == generator.generate(PROMPTS, 8, warm, seed=3)
    assert a != generator.generate(PROMPTS, 8, warm, seed=4)
    assert a[:1] == generator.generate(PROMPTS[:1], 8, warm, seed=3), (
        "a row's draw depends on the other rows"
    )


@pytest.mark.parametrize("size", [5, 128, 300])
def test_greedy_takes_the_first_of_the_largest(size):
    for seed in range(20):
        values = np.random.default_rng(seed).integers(-9, 3, size).astype(np.float32)
        assert (
            int(sample_token(jnp.array(values), jax.random.key(0), Sampling())) == values.argmax()
        )


def test_greedy_at_zero_and_the_nucleus():
    values = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(top_p):
        return np.array(
            jax.jit(jax.vmap(lambda key: sample_token(values, key, Sampling(1.0, top_p))))(keys)
        )

    assert int(sample_token(values, keys[0], Sampling())) == 0
    assert set(draw(0.7).tolist()) == {0, 1}, "0.5 alone is short of 0.7, 0.5 + 0.3 reaches it"
    np.testing.assert_allclose(
        np.bincount(draw(1.0), minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03
    )
