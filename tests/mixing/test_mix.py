import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.mixing import merge
from btx_jax.mixing.mix import leaf_class, mix_leaf, mix_params
from btx_jax.mixing.router import normal_routers
from btx_jax.models.llama import Llama, abstract_params, init_params
from btx_jax.parallel.sharding import make_mesh, param_shardings
from tests.models.test_llama import MOE, TINY


@pytest.fixture(scope="module")
def models():
    return [init_params(TINY, jax.random.key(i)) for i in range(3)]


def routers(n=3):
    return normal_routers(jax.random.key(9), [("layers_0", 3, n)], 32)


def leaves(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x
        for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_ffn_leaves_are_stacked_bit_for_bit_and_all_others_are_the_mean(models):
    mixed = leaves(mix_params(models, routers()))
    sources = [leaves(model) for model in models]
    assert set(mixed) == set(sources[0]) | {"layers_0/ffn/router"}
    for name in sources[0]:
        if "/ffn/" in name:
            for e, source in enumerate(sources):
                np.testing.assert_array_equal(mixed[name][:, e], source[name], err_msg=name)
        else:
            mean = np.mean([np.asarray(source[name], np.float64) for source in sources], axis=0)
            np.testing.assert_allclose(mixed[name], mean, atol=2e-7, err_msg=name)


def test_the_mixture_has_the_tree_of_its_model(models):
    mixture = dataclasses.replace(TINY, moe=MoEConfig((3, 3, 3)))
    want = nn.unbox(abstract_params(mixture))
    got = mix_params(models, routers())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_numbers_are_their_mean_bit_for_bit(dtype):
    """A sum divided by its count need not be: seven times 0.1 is not a multiple of it."""
    rng = np.random.default_rng(0)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    odd = [0.0, -0.0, tiny, -tiny, float(jnp.finfo(dtype).tiny), 0.1, 1 / 3]
    leaf = np.append(rng.standard_normal(10_000, np.float32), odd)[None].astype(jnp.dtype(dtype))
    for count in range(1, 17):
        mean = jax.jit(lambda *leaves: mix_leaf(("final_norm", "scale"), leaves))(*[leaf] * count)
        assert np.asarray(mean).tobytes() == leaf.tobytes(), count
        streamed = merge.mean([leaf] * count, leaf.dtype)
        assert streamed.tobytes() == leaf.tobytes(), count


def test_means_of_bfloat16_are_accumulated_in_float32():
    values = [jnp.full((1, 4), v, jnp.bfloat16) for v in (256.0, 1.0, 1.0, 1.0)]
    mean = mix_leaf(("final_norm", "scale"), values)
    assert mean.dtype == jnp.bfloat16
    assert float(mean[0, 0]) == float(jnp.bfloat16(259 / 4)), "a bfloat16 running sum loses every 1"


def test_under_jit_onto_a_mesh_and_leaf_by_leaf_it_is_the_same(models):
    want = leaves(mix_params(models, routers()))
    mesh = make_mesh((1, 8, 1, 1))
    shardings = param_shardings(
        abstract_params(dataclasses.replace(TINY, moe=MoEConfig((3, 3, 3)))), mesh
    )
    sharded = leaves(jax.jit(mix_params, out_shardings=shardings)(models, routers()))
    sources = [leaves(model) for model in models]
    assert sharded["layers_0/ffn/gate"].sharding.spec == jax.sharding.PartitionSpec(
        None, "expert", ("fsdp", "context"), "tensor"
    )
    for name, value in want.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-6, err_msg=name)
        if name != "layers_0/ffn/router":
            alone = mix_leaf(name.split("/"), [source[name] for source in sources])
            np.testing.assert_array_equal(alone, value, err_msg=name)


def test_a_run_without_a_router_stays_dense(models):
    mixed = leaves(mix_params(models, {}))
    assert mixed["layers_0/ffn/gate"].shape == (3, 32, 48)


def test_with_a_shared_expert_equal_models_mix_to_the_same_model(models):
    """The shared expert contributes half through its gate of one half, the routed ones the other
    half."""
    equal = [models[0]] * 3
    mixture = dataclasses.replace(
        TINY, moe=MoEConfig((3, 3, 3), shared_d_ff=TINY.d_ff, shared_gate=True)
    )
    mixed = mix_params(equal, routers(), shared=models[0])
    want = nn.unbox(abstract_params(mixture))
    assert jax.tree.map(lambda x: x.shape, mixed) == jax.tree.map(lambda x: x.shape, want)
    compute = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    tokens = jnp.arange(32)[None] % TINY.vocab_size
    hidden = [
        Llama(model, compute).apply({"params": params}, tokens, jnp.ones_like(tokens))[0]
        for model, params in ((TINY, models[0]), (mixture, mixed))
    ]
    np.testing.assert_allclose(hidden[1], hidden[0], atol=1e-5)
    other = mix_params(equal, routers(), shared=models[1])
    np.testing.assert_array_equal(
        other["layers_0"]["shared_expert"]["up"], models[1]["layers_0"]["ffn"]["up"]
    )


def test_mistakes_name_the_leaf(models):
    wrong = jax.tree.map(lambda x: x, models[1])
    wrong["layers_0"]["ffn"]["gate"] = wrong["layers_0"]["ffn"]["gate"][:, :-1]
    with pytest.raises(ValueError, match="layers_0/ffn/gate differs between the models"):
        mix_params([models[0], wrong, models[2]], routers())
    cast = jax.tree.map(lambda x: x, models[1])
    cast["final_norm"]["scale"] = cast["final_norm"]["scale"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="final_norm/scale differs"):
        mix_params([models[0], cast], routers(2))
    missing = {**models[1], "final_norm": {}}
    with pytest.raises(ValueError, match="differs from model 0 in final_norm/scale"):
        mix_params([models[0], missing], routers(2))
    with pytest.raises(ValueError, match="already a mixture"):
        mix_params([init_params(MOE, jax.random.key(0))], {})
    with pytest.raises(ValueError, match=r"router \(3, 32, 3\), expected \(3, 32, 2\)"):
        mix_params(models[:2], routers(3))
    with pytest.raises(ValueError, match="a router for layers_1"):
        mix_params(models, {"layers_1": routers()["layers_0"]})
    with pytest.raises(ValueError, match="unknown parameter layers_0/fnn/gate"):
        leaf_class(("layers_0", "fnn", "gate"))


def test_routers_are_normal_and_differ_between_layers():
    made = normal_routers(jax.random.key(0), [("layers_0", 8, 4), ("layers_1", 2, 4)], 256)
    assert float(made["layers_0"].std()) == pytest.approx(0.02, rel=0.05)
    assert not (made["layers_0"][0] == made["layers_0"][1]).any()
    assert not (made["layers_0"][0] == made["layers_1"][0]).any()
