import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.costs.program import read_program
from btx_jax.errors import UserError
from btx_jax.models.llama import abstract_params
from btx_jax.parallel import sharding
from btx_jax.parallel.compiler_options import compiler_options
from btx_jax.parallel.sharding import (
    MESH_AXES,
    all_gather,
    axis_index,
    inference_mesh,
    make_mesh,
    param_shardings,
    resolve,
    shard,
    shard_map,
)
from btx_jax.planning.compile_check import topology_devices
from btx_jax.training.step import init_state, lower_train_step, make_train_step
from tests.models.test_llama import TINY

MODEL = dataclasses.replace(TINY, moe=MoEConfig((4, 4, 4)))
COMPUTE = ComputeConfig(
    dispatch="einsum",
    dtype="float32",
    remat="full",
    capacity_factor=2.0,
    group_size=16,
    loss_chunk=32,
)
TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-2)


def batch_of(seed=0, length=32):
    tokens = jax.random.randint(jax.random.key(seed), (8, length + 1), 0, 64, jnp.int32)
    segments = jnp.ones_like(tokens).at[3, 20:].set(2).at[5, 10:].set(0)
    return {"tokens": tokens, "segments": segments}


def test_names_resolve_by_one_table():
    assert resolve(("layer", "expert", "expert_embed", "hidden")) == jax.sharding.PartitionSpec(
        None, "expert", ("fsdp", "context"), "tensor"
    )
    assert resolve(("batch", None)) == jax.sharding.PartitionSpec(("data", "fsdp", "expert"), None)


def test_a_mistyped_axis_raises_instead_of_replicating():
    with pytest.raises(KeyError, match="no sharding rule for logical axis 'gruop'"):
        resolve(("gruop", None))
    with pytest.raises(ValueError, match="two dimensions on mesh axis"):
        resolve(("batch", "embed"))
    with pytest.raises(ValueError, match="the mesh has"):
        resolve(("embed",), ("data", "model"))
    with jax.set_mesh(make_mesh((1, 8, 1, 1))), pytest.raises(KeyError, match="bacth"):
        jax.jit(lambda x: shard(x, "bacth"))(jnp.ones(8))
    mesh = make_mesh((1, 8, 1, 1))
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((32,), jnp.float32), names=("embde",))
    with pytest.raises(KeyError, match="embde"):
        param_shardings({"x": box}, mesh)
    with pytest.raises(ValueError, match="parameter x has no logical axis names"):
        param_shardings({"x": jax.ShapeDtypeStruct((32,), jnp.float32)}, mesh)


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(
        UserError,
        match=(
            r"layers_0/ffn/router has 32|embed/embedding has 64|layers_0.* not divisible by the 8"
            r" devices of tensor"
        ),
    ):
        param_shardings(abstract_params(MODEL), make_mesh((1, 1, 1, 8)))


@pytest.mark.parametrize(
    ("topology", "slices", "shape"),
    [
        ("v5p:2x2x4", 1, (1, 4, 4, 1, 1)),
        ("v5e:8x8", 1, (1, 16, 4, 1, 1)),
        ("v6e:8x8", 1, (1, 16, 4, 1, 1)),
        ("v6e:8x8", 1, (1, 16, 2, 2, 1)),
        ("v6e:8x16", 1, (1, 32, 4, 1, 1)),
        ("v5p:4x4x4", 1, (1, 8, 8, 1, 1)),
        ("v6e:8x8", 2, (2, 16, 4, 1, 1)),
    ],
)
def test_a_mesh_fits_a_slice_though_its_axes_share_those_of_the_torus(topology, slices, shape):
    devices = topology_devices(topology, slices)
    mesh = make_mesh(shape, devices)
    assert tuple(mesh.shape.values()) == shape and mesh.devices.size == len(devices)
    if topology.startswith("v6e"):  # there experts lie along a part of one axis
        experts = mesh.devices[0, 0, :, 0, 0]
        places = np.array([device.coords for device in experts])
        assert (abs(np.diff(places, axis=0)).sum(1) == mesh.shape["tensor"]).all()


@pytest.mark.parametrize("shape", [(1, 4, 2, 1), (1, 8, 1, 1)])
def test_a_gather_in_stages_is_the_gather(shape, monkeypatch):
    """Two chips in a stage, as if eight CPUs were a large slice."""
    mesh = make_mesh(shape)
    x = jnp.arange(16.0 * 3).reshape(16, 3)

    def both(x):
        def local(x):
            return all_gather(x, "embed", 0) * (1 + axis_index("embed"))

        y = shard_map(local, (("embed", None),), ("batch", None))(x)
        return (y * jnp.arange(y.size).reshape(y.shape)).sum(), y

    def program():
        with jax.set_mesh(mesh):
            made = jax.jit(jax.grad(both, has_aux=True)).lower(x).compile()
            return made.as_text(), made(x)

    text, whole = program()
    assert text.count(" all-gather(") == 1
    monkeypatch.setattr(sharding, "IN_ONE_STAGE", {jax.devices()[0].device_kind: 2})
    text, staged = program()
    assert text.count(" all-gather(") == 2, "one for each axis, or two for one of all devices"
    jax.tree.map(np.testing.assert_array_equal, staged, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v5p:4x4x4", (1, 64, 1, 1, 1)),
        ("v5p:4x4x4", (1, 16, 1, 1, 4)),
        ("v5p:8x8x4", (1, 256, 1, 1, 1)),
        ("v5e:16x16", (1, 256, 1, 1, 1)),
        ("v6e:8x8", (1, 64, 1, 1, 1)),
    ],
)
def test_gathers_on_a_large_slice_are_gathers(topology, shape):
    """The TPU compiler may make all-reduces of them, with twice the traffic."""
    devices = topology_devices(topology, 1)
    mesh = make_mesh(shape, devices)
    rows = ("batch", "sequence", None)

    def body(x, w):
        def local(x, w):
            return jnp.tanh(x @ all_gather(w, "embed", 0))

        return shard_map(local, (rows, ("embed", None)), rows)(x, w), None

    def abstract(size, *names):
        there = NamedSharding(mesh, resolve(names))
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=there)

    x = abstract((mesh.size, 8 * mesh.size, 4096), *rows)
    kernels = abstract((4, 4096, 4096), None, "embed", None)
    options = compiler_options(devices[0])
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x, ws: jax.lax.scan(body, x, ws), compiler_options=options)
        text = step.lower(x, kernels).compile().as_text()
    assert re.search(r" all-gather(-start)?\(", text)
    assert not re.search(r" all-reduce(-start)?\(", text)


def test_shard_outside_any_mesh_is_the_identity():
    x = jnp.ones(4)
    assert shard(x, "batch") is x


@pytest.mark.parametrize(
    ("dispatch", "kernels", "remat"),
    [
        ("einsum", "xla", "offload"),
        ("ragged", "xla", "full"),
        pytest.param("ragged", "pallas_interpret", "full", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_loss_and_gradients_of_one(dispatch, kernels, remat):
    results = []
    for mesh in (
        make_mesh((1, 1, 1, 1), jax.devices()[:1]),
        make_mesh((1, 2, 4, 1)),
        make_mesh((2, 1, 2, 2)),
    ):
        used = kernels if results else "xla"
        kept = remat if results else "none"
        compute = dataclasses.replace(COMPUTE, dispatch=dispatch, kernels=used, remat=kept)
        step = make_train_step(MODEL, compute, TRAIN, mesh, 32)
        state = init_state(MODEL, TRAIN, mesh, jax.random.key(0))
        losses = []
        for i in range(2):
            batch = {
                k: jax.device_put(v, jax.NamedSharding(mesh, resolve(("batch", None))))
                for k, v in batch_of(i).items()
            }
            state, metrics = step(state, batch, jax.random.key(1))
            losses.append((metrics.loss, metrics.lm_loss, metrics.balance_loss, metrics.grad_norm))
        # Adam's first moment after one more step is a sum of gradients: every leaf's gradient is
        # compared.
        results.append(jax.device_get((losses, metrics.routing, state.opt_state)))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def compiled_text(model, compute, length, mesh):
    (step,) = lower_train_step(model, compute, TRAIN, mesh, length)
    return step.program.compile().as_text()


def test_compiled_moe_step_moves_tokens_and_not_experts():
    mesh = make_mesh((1, 2, 4, 1))
    text = compiled_text(MODEL, COMPUTE, 32, mesh)
    all_to_alls = len(re.findall(r"= .* all-to-all(?:-start)?\(", text))
    assert all_to_alls >= 4, (
        f"{all_to_alls} all-to-alls in the compiled step, at least 4 expected (dispatch and"
        " combine, forward and backward). A sharding constraint is lost and every device gathers"
        " all experts or all tokens: results stay right and a pod becomes many times slower. Look"
        " for shard() called outside jax.set_mesh, or a renamed axis."
    )
    experts = [
        line
        for line in text.splitlines()
        if re.search(r"= f32\[(?:\d+,)?4,(32,48|48,32)\]\S* all-gather", line)
    ]
    assert not experts, (
        f"whole expert weights are gathered over the expert axis: {experts[0][:200]}"
    )


def test_compiled_ragged_step_gathers_tokens_over_experts_and_weights_over_fsdp():
    mesh = make_mesh((1, 2, 4, 1))
    compute = dataclasses.replace(COMPUTE, dispatch="ragged")
    program = read_program(compiled_text(MODEL, compute, 32, mesh))
    expert = 32 * 48 * 4  # one matrix of one expert, float32
    in_ffn = [c for c in program.collectives if "ffn" in c.where]
    weights = [
        c for c in in_ffn if c.kind == "all-gather" and c.bytes % expert == 0 and c.bytes >= expert
    ]
    assert weights
    assert {c.group_size for c in weights} == {2}, (
        "expert weights travel over fsdp alone: the expert axis holds whole experts"
    )
    tokens = [
        c
        for c in in_ffn
        if c.kind == "all-gather" and c.group_size == 4 and c.bytes == 4 * 32 * 32 * 4
    ]
    assert tokens, "the tokens of four devices are gathered over the expert axis"
    assert [c for c in in_ffn if c.kind == "reduce-scatter" and c.group_size == 4], (
        "answers are summed and scattered over it"
    )
    assert not [c for c in in_ffn if c.kind == "all-to-all"]
    assert not [c for c in in_ffn if c.kind == "all-reduce" and c.bytes >= expert], (
        "a whole expert's gradient is all-reduced"
    )


def test_the_training_step_never_holds_all_logits():
    compute = dataclasses.replace(COMPUTE, loss_chunk=48)
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    model = dataclasses.replace(MODEL, vocab_size=112)  # a size that nothing else has
    text = compiled_text(model, compute, 24, mesh)
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}
    with_vocabulary = {dims for dims in shapes if dims[-1] == 112}
    assert any(math.prod(dims) == 48 * 112 for dims in with_vocabulary), (
        "logits of one chunk of 48 tokens"
    )
    whole = [dims for dims in with_vocabulary if math.prod(dims) >= 8 * 24 * 112]
    assert not whole, f"logits of the whole batch exist at once: {whole}"


def test_state_lies_where_the_table_says():
    mesh = make_mesh((1, 2, 4, 1))
    state = init_state(MODEL, TRAIN, mesh, jax.random.key(0))
    gate = state.params["layers_0"]["ffn"]["gate"]
    assert gate.sharding.shard_shape(gate.shape) == (3, 1, 16, 48)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == gate.shape]
    assert len(moments) >= 2
    assert all(m.sharding.shard_shape(m.shape) == (3, 1, 16, 48) for m in moments), (
        "moments lie elsewhere than their parameters"
    )
    assert mesh.axis_names == MESH_AXES


def test_inference_spreads_weights_over_as_many_devices_as_divide_them():
    heads = dataclasses.replace(TINY, heads=6, kv_heads=3, vocab_size=66, d_ff=96)
    for model, count in (
        (dataclasses.replace(TINY, heads=4, kv_heads=4, vocab_size=64, d_ff=96), 4),
        (heads, 3),
    ):
        mesh = inference_mesh(model)
        assert dict(mesh.shape) == {
            "data": 1,
            "fsdp": 1,
            "expert": 1,
            "tensor": count,
            "context": 1,
        }
