"""Compiler options: from the chip's table and from the config, in every program of a run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.errors import UserError
from btx_jax.evaluation.heldout import lower_heldout_step
from btx_jax.parallel.compiler_options import OPTIONS, compiled, compiler_options
from btx_jax.planning.compile_check import topology_devices
from btx_jax.training.step import make_train_step, state_shardings
from tests.models.test_llama import TINY

V5E = SimpleNamespace(device_kind="TPU v5 lite")
VECTOR_MEMORY = "xla_tpu_scoped_vmem_limit_kib"


def test_the_config_adds_to_the_chips_options_replaces_them_and_leaves_them_out():
    table = {name: value for some in OPTIONS["TPU v5 lite"] for name, value in some.values.items()}
    assert VECTOR_MEMORY in table
    assert compiler_options(V5E) == table
    changed = compiler_options(V5E, (f"{VECTOR_MEMORY}=65536", "xla_other=a=b"))
    assert changed == table | {VECTOR_MEMORY: "65536", "xla_other": "a=b"}
    assert compiler_options(V5E, tuple(f"{name}=" for name in table)) == {}
    assert compiler_options(jax.devices()[0]) == {}, "a CPU has none"
    with pytest.raises(UserError, match=r"config.compute.compiler_options: 'fast': write NAME="):
        compiler_options(V5E, ("fast",))


def test_training_and_held_out_losses_are_compiled_with_them(one_device):
    compute = ComputeConfig("float32", "none", compiler_options=("xla_no_such=1",))
    train = TrainConfig(steps=2, batch_size=4, warmup_steps=1)
    told = r"config.compute.compiler_options: .*xla_no_such.*; NAME= leaves an option out"
    with pytest.raises(UserError, match=told):
        make_train_step(TINY, compute, train, one_device, 16)
    params = state_shardings(TINY, train, one_device)[0].params
    with pytest.raises(UserError, match=told):
        compiled(lower_heldout_step(TINY, compute, one_device, params, 4, 16))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_takes_the_options_of_its_chips(topology):
    device = topology_devices(topology, 1)[0]
    options = compiler_options(device)
    assert options
    sharding = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    compiled(jax.jit(lambda x: x @ x, compiler_options=options).lower(x))
