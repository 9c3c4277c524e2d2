"""The training step of a branch with an anchor, compared with a twin from the formulas, and sharded
over eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.checkpoints.training_state import named_leaves
from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.models.llama import init_params
from btx_jax.parallel.sharding import make_mesh, resolve
from btx_jax.training.optimizer import is_trained, split
from btx_jax.training.step import init_state, make_train_step
from tests import reference
from tests.models.test_llama import TINY

BRANCH = dataclasses.replace(TINY, moe=MoEConfig((1,) * TINY.layers, anchor=True))
MIXTURE = dataclasses.replace(TINY, moe=MoEConfig((4,) * TINY.layers, anchor=True))
COMPUTE = ComputeConfig(dtype="float32", remat="none", dispatch="ragged", loss_chunk=64)
TRAIN = TrainConfig(
    steps=10, batch_size=8, warmup_steps=2, learning_rate=1e-2, balance_weight=0.0,
    z_loss_weight=0.1, clip_norm=0.05, frozen="shared",
)  # fmt: skip


def batch_of(seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (8, 17), 0, 64, jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens).at[1, 5:].set(0)}


def started(model=BRANCH):
    """Parameters that all affect the output."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x + (0.3 if path[-1].key == "router_bias" else 0),
        init_params(model, jax.random.key(0)),
    )


def loss(own, shared, batch):
    """LM loss and z-loss, one layer, head and expert after another."""
    rows, segments = batch["tokens"][:, :-1], batch["segments"][:, :-1]
    targets = (batch["segments"][:, 1:] > 0) & (segments == batch["segments"][:, 1:])
    norm = lambda x, scale: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale  # noqa: E731
    angles = np.outer(np.arange(rows.shape[1]), 10_000.0 ** (-np.arange(4) / 4))
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(x):
        a, b = x[..., :4], x[..., 4:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, z = shared["embed"]["embedding"][rows], 0.0
    for layer in range(TINY.layers):
        tree = jax.tree.map(lambda w, layer=layer: w[layer], shared["layers_0"])
        ffn = jax.tree.map(lambda w, layer=layer: w[layer], own["layers_0"]["ffn"])
        w, h = tree["attention"], norm(x, tree["attention_norm"]["scale"])
        q, k, v = (jnp.einsum("btd,dhk->bhtk", h, w[n]) for n in ("query", "key", "value"))
        y = reference.attention(turned(q), turned(k), v, segments)
        x += jnp.einsum("bhtk,hkd->btd", y, w["out"])
        h = norm(x, tree["ffn_norm"]["scale"])
        logit = (h @ ffn["router"])[..., 0] + ffn["router_bias"][0]
        gate = jax.nn.sigmoid(logit)[..., None]
        mine = reference.swiglu(h, *(ffn[n][0] for n in ("gate", "up", "down")))
        anchors = reference.swiglu(h, *(tree["anchor"][n] for n in ("gate", "up", "down")))
        x += gate * mine + (1 - gate) * anchors
        z += (jnp.log1p(jnp.exp(logit)) ** 2 * (segments > 0)).sum() / (segments > 0).sum()
    hidden = norm(x, shared["final_norm"]["scale"])
    head = shared["head"]["kernel"]
    nll = reference.cross_entropy(hidden, head, batch["tokens"][:, 1:], targets) / targets.sum()
    return nll + TRAIN.z_loss_weight * z, nll


def test_a_step_is_the_formulas(one_device):
    params = started()
    own, shared = split(params, "shared")
    (want, nll), grads = jax.value_and_grad(loss, has_aux=True)(own, shared, batch_of())
    grads = {name: np.asarray(g, np.float64) for name, g in named_leaves(grads).items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 2 * TRAIN.clip_norm
    assert all(np.abs(g).max() > 1e-6 for g in grads.values())

    step = make_train_step(BRANCH, COMPUTE, TRAIN, one_device, 16)
    state = init_state(BRANCH, TRAIN, one_device, params=jax.device_put(params))
    before = jax.device_get(named_leaves(params))
    state, metrics = step(state, batch_of(), jax.random.key(7))
    assert float(metrics.loss) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics.lm_loss) == pytest.approx(float(nll), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-4)
    after = jax.device_get(named_leaves(state.params))
    for name, was in before.items():
        if name not in grads:
            assert np.array_equal(after[name], was), name
            continue
        g = grads[name] * TRAIN.clip_norm / norm
        adam = g / (np.abs(g) + TRAIN.eps)  # the first step's
        decay = 0 if name.endswith("bias") else TRAIN.weight_decay
        np.testing.assert_allclose(
            after[name], was - 5e-3 * (adam + decay * was), atol=2e-5, err_msg=name
        )
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(g.size for g in grads.values())


@pytest.mark.parametrize("frozen", ["shared", "shared_layers", "anchor", "experts"])
def test_what_each_step_of_a_schedule_trains(frozen):
    trained = {
        name for name in named_leaves(started()) if is_trained(tuple(name.split("/")), frozen)
    }
    others = {name for name in named_leaves(started()) if name not in trained}
    parts = {name.split("/")[-2] for name in trained}
    if frozen == "experts":
        assert others == {
            f"layers_0/{part}/{name}" for part in ("ffn", "anchor") for name in ("gate", "up", "down")
        }  # fmt: skip
        return
    assert not any("/anchor/" in name for name in trained)
    assert {name for name in others if "/ffn/" in name} == set()
    assert parts == {
        "shared": {"ffn"},
        "shared_layers": {"ffn", "embed", "head"},
        "anchor": {
            "ffn", "embed", "head", "attention", "attention_norm", "ffn_norm", "final_norm",
        },
    }[frozen]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "frozen", "dispatch"),
    [
        pytest.param(BRANCH, "shared", "ragged", marks=pytest.mark.slow),
        pytest.param(MIXTURE, "all_but_routers", "einsum", marks=pytest.mark.slow),
        pytest.param(BRANCH, "anchor", "einsum", marks=pytest.mark.slow),
        pytest.param(MIXTURE, "", "ragged", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_take_the_step_of_one(model, frozen, dispatch):
    train = dataclasses.replace(TRAIN, frozen=frozen, balance_weight=0.01)
    compute = dataclasses.replace(COMPUTE, dispatch=dispatch, group_size=16, capacity_factor=5.0)
    results = []
    for mesh in (
        make_mesh((1, 1, 1, 1), jax.devices()[:1]),
        make_mesh((1, 8, 1, 1) if model is BRANCH else (1, 2, 4, 1)),
        make_mesh((2, 2, 1, 2)),
    ):
        step = make_train_step(model, compute, train, mesh, 16)
        state = init_state(model, train, mesh, jax.random.key(0))
        lines = []
        for i in range(2):
            rows = jax.NamedSharding(mesh, resolve(("batch", None)))
            batch = {key: jax.device_put(x, rows) for key, x in batch_of(i).items()}
            state, metrics = step(state, batch, jax.random.key(1))
            lines.append((metrics.loss, metrics.lm_loss, metrics.z_loss, metrics.grad_norm))
        results.append(jax.device_get((lines, metrics.routing, state.opt_state)))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
