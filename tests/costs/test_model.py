"""The formula for the FLOPs of a training step, compared with the matmuls that XLA compiles."""

import dataclasses
import functools

import jax
import pytest

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import LoRAConfig, MoEConfig
from btx_jax.costs.chips import peak_flops_per_device
from btx_jax.costs.model import attention_flops, flops_by_leaf, train_flops
from btx_jax.costs.program import read_program
from btx_jax.models.leaves import is_norm_or_bias
from btx_jax.models.llama import init_params, parameter_counts
from btx_jax.presets.recipes import LLAMA2_7B
from btx_jax.training.optimizer import is_trained
from btx_jax.training.step import lower_train_step
from tests.models.test_llama import TINY

# All experts take every token, and layers are unrolled: in a loop, the first layer would have the
# backward pass of the others.
COMPUTE = ComputeConfig(
    "float32", "none", unroll=3, dispatch="einsum", capacity_factor=1.0, group_size=8, loss_chunk=64
)
LENGTH, ROWS = 16, 4
BESIDE = ("gsd,gsec->egcd", "egcd,gsec->gsd")  # dispatch and combine

TIED = dataclasses.replace(TINY, tied_head=True)
MOE = dataclasses.replace(TINY, moe=MoEConfig((2, 2, 2)))
SHARED = dataclasses.replace(TINY, moe=MoEConfig((0, 2, 2), shared_d_ff=16, shared_gate=True))


def lora(*targets, allocation="2"):
    given = {"targets": targets} if targets else {}
    return dataclasses.replace(TINY, lora=LoRAConfig(allocation, rank=(4,), k=(2,), **given))


def products(model, frozen, mesh):
    """FLOPs per token in the compiled step's matmuls, except those that move tokens."""
    train = TrainConfig(steps=10, batch_size=ROWS, warmup_steps=2, frozen=frozen)
    (step,) = lower_train_step(model, COMPUTE, train, mesh, LENGTH)
    places = read_program(step.program.compile().as_text()).by_place.items()
    counted = [n for place, n in places if place and not any(name in place for name in BESIDE)]
    return sum(counted) / (ROWS * LENGTH)


def is_product(path, model):
    """Whether a parameter is used in a matmul; others are used in lookups, sums, and products of
    single numbers."""
    lookup = path[0] == "embed" and not model.tied_head
    return not (lookup or is_norm_or_bias(path) or path[-2:] == ("shared_expert", "router"))


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        pytest.param(TINY, "", id="dense"),
        pytest.param(TINY, "shared", id="dense-shared"),
        pytest.param(TIED, "shared", id="tied-shared"),
        pytest.param(MOE, "", id="moe"),
        pytest.param(MOE, "experts", id="moe-experts"),
        pytest.param(MOE, "all_but_routers", id="moe-routers"),
        pytest.param(SHARED, "experts", id="shared_expert-experts"),
        pytest.param(lora(), "base", id="lora"),
        pytest.param(lora(), "all_but_routers", id="lora-routers", marks=pytest.mark.slow),
        pytest.param(lora("down"), "base", id="lora_down"),
        pytest.param(lora("o", "gate", allocation="0,2,2"), "base", id="lora_upper_layers"),
    ],
)
def test_flops_are_those_of_the_compiled_step(model, frozen, one_device):
    trained = functools.partial(is_trained, frozen=frozen)
    flops = flops_by_leaf(model, trained)
    needed = sum(n for path, n in flops.items() if is_product(path, model))
    # XLA's attention also computes scores above the diagonal.
    scores = 2 * attention_flops(model, 1, LENGTH, trained)
    assert products(model, frozen, one_device) == needed + scores, (
        "the formula leaves out, or adds, a product of the backward pass"
    )


def test_all_trained_they_are_6_n_d():
    size = sum(x.size for x in jax.tree.leaves(init_params(TINY, jax.random.key(0))))
    assert train_flops(TINY, 10) == 60 * size
    assert train_flops(MOE, 10) == 60 * parameter_counts(MOE)[1]
    assert peak_flops_per_device() > 1e8


def test_what_freezing_saves_of_7b():
    """Attention (2.1 of 6.7 billion) and the embeddings need no weight gradient."""
    shared = functools.partial(is_trained, frozen="shared")
    share = train_flops(LLAMA2_7B, 1, shared) / train_flops(LLAMA2_7B, 1)
    assert share == pytest.approx(0.87, abs=0.01)
