import dataclasses

import jax
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.errors import ConfigError
from btx_jax.evaluation import oracle
from btx_jax.evaluation.heldout import make_heldout_step, token_losses
from btx_jax.mixing.mix import mix_branches, mix_params
from btx_jax.models.llama import init_params
from tests.evaluation.test_heldout import rows_of
from tests.models.test_llama import TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", loss_chunk=16)
EXPERTS = 3


def test_a_mixture_that_is_told_is_its_shared_leaves_around_one_expert(one_device):
    """Compared with the equivalent dense model."""
    models = [init_params(TINY, jax.random.key(seed)) for seed in range(EXPERTS)]
    mixture = dataclasses.replace(TINY, moe=MoEConfig((EXPERTS,) * TINY.layers))
    router = jax.random.normal(jax.random.key(9), (TINY.layers, TINY.d_model, EXPERTS))
    mixed = mix_params(models, {"layers_0": router})
    averaged = mix_params(models, {})
    rows = rows_of()

    def losses(model, params):
        return token_losses(
            make_heldout_step(model, COMPUTE, one_device), params, rows, 2, one_device
        )[0][rows["segments"][:, :-1] > 0]

    untold = losses(mixture, mixed)
    for expert, own in enumerate(models):
        layers = averaged["layers_0"] | {"ffn": own["layers_0"]["ffn"]}
        want = losses(TINY, averaged | {"layers_0": layers})
        got = losses(mixture, oracle.told(mixed, expert))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert np.abs(got - untold).max() > 1e-2, "the experts are too alike to tell anything"


def test_a_mixture_beside_an_anchor_that_is_told_is_the_branch_or_the_anchor(one_device):
    branch = dataclasses.replace(TINY, moe=MoEConfig((1,) * TINY.layers, k=2, anchor=True))
    mixture = dataclasses.replace(TINY, moe=MoEConfig((EXPERTS,) * TINY.layers, k=2, anchor=True))
    seed = init_params(branch, jax.random.key(0))
    layers = seed["layers_0"]
    branches = [
        seed
        | {"layers_0": layers | {"ffn": init_params(branch, jax.random.key(n))["layers_0"]["ffn"]}}
        for n in range(1, EXPERTS + 1)
    ]
    mixed = mix_branches(branches)
    rows = rows_of()

    def losses(model, params):
        nll, *_ = token_losses(
            make_heldout_step(model, COMPUTE, one_device), params, rows, 2, one_device
        )
        return nll[rows["segments"][:, :-1] > 0]

    untold = losses(mixture, mixed)
    for expert, own in enumerate(branches):
        got = losses(mixture, oracle.told(mixed, expert))
        np.testing.assert_allclose(got, losses(branch, own), rtol=1e-5, atol=1e-5)
        assert np.abs(got - untold).max() > 1e-2
    dense = {name: value for name, value in layers.items() if name != "anchor"}
    dense |= {"ffn": layers["anchor"]}
    want = losses(TINY, seed | {"layers_0": dense})
    np.testing.assert_allclose(
        losses(mixture, oracle.told(mixed, EXPERTS)), want, rtol=1e-5, atol=1e-5
    )
    oracle.check(mixture, EXPERTS, "here")


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        (None, "not a mixture; name one"),
        (MoEConfig((4, 2)), "not every layer has an expert 2; use a number below 2"),
        (MoEConfig((4, 4), routing="switch", k=1), "gates do not sum to one"),
        (MoEConfig((4, 4), renormalise=False), "gates do not sum to one"),
    ],
)
def test_what_cannot_be_told_is_refused(moe, said):
    model = dataclasses.replace(TINY, layers=2, moe=moe)
    with pytest.raises(ConfigError, match=f"^here: .*{said}"):
        oracle.check(model, 2, "here")
    oracle.check(dataclasses.replace(model, moe=MoEConfig((4, 4))), 2, "here")
