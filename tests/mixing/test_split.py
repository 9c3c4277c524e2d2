import jax
import numpy as np
import pytest

from btx_jax.config.config import MixConfig
from btx_jax.errors import ConfigError
from btx_jax.mixing.mix import mix_params
from btx_jax.mixing.split import expert_models, split_ffn
from btx_jax.models.llama import init_params
from btx_jax.stages.mix import mixed_model
from tests import reference
from tests.models.test_llama import TINY


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_all_chunks_at_weight_one_are_the_original_block(chunks):
    ffn = init_params(TINY, jax.random.key(0))["layers_0"]["ffn"]
    parts = split_ffn(ffn, chunks)
    assert parts["gate"].shape == (3, chunks, 32, 48 // chunks)
    assert parts["down"].shape == (3, chunks, 48 // chunks, 32)
    x = jax.random.normal(jax.random.key(1), (5, 32))
    for layer in range(3):
        want = reference.swiglu(x, *(ffn[n][layer] for n in ("gate", "up", "down")))
        got = sum(
            reference.swiglu(x, *(parts[n][layer, c] for n in ("gate", "up", "down")))
            for c in range(chunks)
        )
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="d_ff=48 is not divisible into 5"):
        split_ffn(ffn, 5)


def test_split_models_make_smaller_experts_model_by_model():
    models = [init_params(TINY, jax.random.key(i)) for i in range(2)]
    mixed = mix_params(expert_models(models, "split", 2), {"layers_0": jax.numpy.ones((3, 32, 4))})
    ffn = mixed["layers_0"]["ffn"]
    assert ffn["gate"].shape == (3, 4, 32, 24)
    np.testing.assert_array_equal(ffn["gate"][:, 3], models[1]["layers_0"]["ffn"]["gate"][..., 24:])
    np.testing.assert_array_equal(ffn["down"][:, 0], models[0]["layers_0"]["ffn"]["down"][:, :24])
    want = mix_params(models, {"layers_0": jax.numpy.ones((3, 32, 2))})
    np.testing.assert_allclose(mixed["embed"]["embedding"], want["embed"]["embedding"], atol=1e-8)


def test_a_blend_holds_a_chunk_of_every_model_and_all_of_them_together_hold_everything():
    models = [init_params(TINY, jax.random.key(i)) for i in range(4)]
    blended = expert_models(models, "blend")
    assert jax.tree.map(lambda x: x.shape, blended[0]) == jax.tree.map(lambda x: x.shape, models[0])
    for n, model in enumerate(blended):
        for m, source in enumerate(models):
            theirs, ours = source["layers_0"]["ffn"], model["layers_0"]["ffn"]
            np.testing.assert_array_equal(
                ours["up"][..., 12 * m : 12 * m + 12], theirs["up"][..., 12 * n : 12 * n + 12]
            )
            np.testing.assert_array_equal(
                ours["down"][:, 12 * m : 12 * m + 12], theirs["down"][:, 12 * n : 12 * n + 12]
            )
        assert model["embed"] is models[n]["embed"]
    x = jax.random.normal(jax.random.key(1), (5, 32))

    def total(group):
        return sum(
            reference.swiglu(x, *(g["layers_0"]["ffn"][n][0] for n in ("gate", "up", "down")))
            for g in group
        )

    np.testing.assert_allclose(total(blended), total(models), atol=1e-6)


@pytest.mark.parametrize(
    ("mix", "shape", "d_ff"),
    [
        (MixConfig(("a", "b", "c", "d")), (4, 4, 4), 48),
        (MixConfig(("a",), copies=3), (3, 3, 3), 48),
        (MixConfig(("a", "b"), method="split", chunks=2, k=4), (4, 4, 4), 24),
        (MixConfig(("a", "b", "c", "d"), method="blend"), (4, 4, 4), 48),
        (MixConfig(("a", "b"), method="average"), None, 48),
    ],
)
def test_the_mixtures_model(mix, shape, d_ff):
    model = mixed_model(TINY, mix)
    assert model.d_ff == d_ff
    assert (model.moe.experts if model.moe else None) == shape


def test_a_feed_forward_that_cannot_be_cut_is_refused():
    with pytest.raises(
        ConfigError, match=r"config\.mix\.method='blend': d_ff=48 is not divisible into 5"
    ):
        mixed_model(TINY, MixConfig(tuple("abcde"), method="blend"))
    with pytest.raises(ConfigError, match="chunks=1: must be at least 2 with method='split'"):
        MixConfig(("a", "b"), method="split")
    with pytest.raises(ConfigError, match="did you mean 'blend'"):
        MixConfig(("a", "b"), method="blen")
