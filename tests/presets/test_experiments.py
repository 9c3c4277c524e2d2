import dataclasses

import pytest

from btx_jax.errors import ConfigError
from btx_jax.models.llama import parameter_counts
from btx_jax.presets import recipes
from btx_jax.presets.experiments import CLAIMS, GROUPS, LORA_CLAIMS, mixed_text
from btx_jax.stages.pipeline import in_order, resolve


def comparison(group, size="tiny"):
    return recipes.compared(size, group)


def test_texts_are_mixed_in_proportion():
    assert mixed_text({"a:3,b:1": 2, "b": 2}) == "a:37.50,b:62.50"
    assert mixed_text({"a": 1}) == "a:100.00"


@pytest.mark.parametrize("size", ["tiny", "llama2_7b"])
@pytest.mark.parametrize("group", GROUPS)
def test_every_arm_resolves_and_is_evaluated(group, size, tmp_path):
    config = comparison(group, size)
    for name in in_order(config.pipeline):
        resolve(name, config.pipeline[name], config, tmp_path)
    evaluate = config.pipeline["evaluate"].config.evaluate
    known = {*evaluate.models, *evaluate.ensembles}
    for _, _, left, right, _ in {"main": (), "lora": LORA_CLAIMS}.get(group, CLAIMS):
        assert {left, right} <= known
    trained = {name for name, stage in config.pipeline.items() if stage.config.train}
    helpers = {
        name
        for name in trained
        if (name.startswith(("random_", "share_")) and name.count("_") > 1)
        or name[:-1] == "random_"
    }
    assert trained - helpers - {"dense_domains"} <= known, "an arm is trained for nothing"


def test_budgets_are_matched():
    stages = comparison("all").pipeline
    steps = {name: stage.config.train.steps for name, stage in stages.items() if stage.config.train}
    domains = sum(steps[f"expert_{name}"] for name in ("math", "code", "wiki"))
    cost = 1608832 / 1066112  # active parameters of mixture and seed
    budget = domains + steps["btx"] * cost
    assert (
        steps["upcycling_tokens"]
        == steps["dense_throughout"]
        == steps["dense_domains"] + steps["dense"]
        == domains + steps["btx"]
    )
    assert steps["upcycling_flops"] * cost == pytest.approx(budget, abs=1)
    assert steps["upcycling_time"] == pytest.approx(
        steps["expert_math"] / cost + steps["btx"], abs=1
    )
    for share in (25, 50, 75, 100):
        experts = sum(steps[f"share_{share}_{name}"] for name in ("math", "code", "wiki"))
        assert experts == pytest.approx(budget * share / 100, abs=2)
        assert experts + steps.get(f"share_{share}", 0) * cost == pytest.approx(budget, abs=2)


@pytest.mark.parametrize("size", ["tiny", "llama2_7b"])
def test_lora_arms_train_as_many_parameters_on_the_same_text(size):
    stages = comparison("lora", size).pipeline
    base = recipes.MODELS[size]
    arms = {name: stage.config for name, stage in stages.items() if name.startswith("lora_")}
    counts = {
        name: parameter_counts(dataclasses.replace(base, lora=config.lora))[0]
        - parameter_counts(base)[0]
        for name, config in arms.items()
    }
    assert len({count for name, count in counts.items() if name != "lora_plain"}) == 1
    assert counts["lora_plain"] == pytest.approx(counts["lora_rectangle"], rel=0.01)
    assert len({config.data.train for config in arms.values()}) == 1
    assert {config.train.frozen for config in arms.values()} == {"base"}


def test_random_branches_differ_in_nothing_but_their_seed():
    stages = comparison("ablations").pipeline
    random = [stages[f"random_{i}"].config for i in range(3)]
    assert len({config.data.train for config in random}) == 1
    assert len({config.rng_seed for config in random}) == 3


def test_an_unknown_group_is_refused():
    with pytest.raises(ConfigError, match="no such group; known: main, ablations, all"):
        recipes.compared("tiny", "most")
