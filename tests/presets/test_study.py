import re

import pytest

from btx_jax.data.corpora import PARTS
from btx_jax.data.sources import parse_domains
from btx_jax.errors import ConfigError
from btx_jax.presets import study
from btx_jax.presets.experiments import CLAIMS
from btx_jax.stages.pipeline import in_order, resolve


def parts(config):
    """Parts of the corpora that a stage trains on."""
    domains = parse_domains(config.data.train, config.data.domains, "config.data.train")
    return {domain.name.rpartition("_")[2] for domain in domains}


@pytest.mark.parametrize("group", study.GROUPS)
def test_every_arm_resolves_and_is_measured(group, tmp_path):
    config = study.paper_small(group)
    for name in in_order(config.pipeline):
        resolve(name, config.pipeline[name], config, tmp_path)
    evaluate = config.pipeline["evaluate"].config.evaluate
    known = {*evaluate.models, *evaluate.ensembles}
    measured = {path.removeprefix("@") for path in evaluate.models.values()}
    for name, stage in config.pipeline.items():
        helper = re.fullmatch(r"(random|share_\d+)_\w+", name)
        assert not stage.config.train or helper or name in measured, (
            f"{name} is trained for nothing"
        )
    if group in ("all", "tuning"):
        assert {arm for _, _, *arms, _ in CLAIMS for arm in arms} <= known
    for kind in study.BRANCHES:
        assert evaluate.oracles[f"oracle-{kind}-mean"].experts == {
            "math": 0,
            "code": 1,
            "world": 2,
            "prose": 3,
        }


def test_no_phase_reads_another_phases_text():
    stages = study.paper_small("tuning").pipeline
    seen = {name: parts(stage.config) for name, stage in stages.items() if stage.config.train}
    throughout = re.compile(r"(tried-)?(dense|upcycling|drop_upcycling)")
    for name, found in seen.items():
        if name == "seed":
            assert found == {"seed"}
        elif name.startswith(("expert-", "random_")) or re.fullmatch(r"share_\d+_\w+", name):
            assert (found == {"branch"}) == (name != "random_split"), name
        elif throughout.match(name):
            assert found == {"branch", "finetune"}, name
        else:
            assert found == {"finetune"}, name
    assert set.union(*seen.values()) == set(PARTS)


def test_peers_have_the_budgets_of_btx():
    stages = study.paper_small("main").pipeline
    steps = {name: stage.config.train.steps for name, stage in stages.items() if stage.config.train}
    cost = 1608832 / 1066112  # active parameters of mixture and seed
    branches = 3 * study.BRANCH_STEPS
    tokens = branches + study.FINETUNE_STEPS
    assert steps["tried-dense-30"] == steps["tried-upcycling-30"] == steps["drop_upcycling"]
    assert steps["drop_upcycling"] == tokens and steps["tried-btx-30"] == study.FINETUNE_STEPS
    for arm, each in (("dense", 1.0), ("upcycling", cost)):
        assert steps[f"{arm}_flops"] * each == pytest.approx(
            branches + study.FINETUNE_STEPS * cost, abs=1
        )
        assert steps[f"{arm}_time"] * each == pytest.approx(
            study.BRANCH_STEPS + study.FINETUNE_STEPS * cost, abs=1
        )


def test_rates_are_those_of_the_arms():
    stages = study.paper_small("tuning").pipeline

    def rate(name):
        return stages[name].config.train.learning_rate / study.SEED_RATE

    for kind, branch in study.BRANCHES.items():
        assert rate(f"expert-{kind}-math") == pytest.approx(branch.rate)
    assert rate("dense_time") == pytest.approx(study.BEST_RATE["dense"])
    assert rate("drop_upcycling") == pytest.approx(study.BEST_RATE["upcycling"])
    assert rate("no_balance") == pytest.approx(study.BEST_RATE["btx"])
    assert rate("share_50_math") == pytest.approx(study.BRANCHES[study.BEST].rate)
    for percent in (100, 30, 10):
        for peer in study.BEST_RATE:
            assert rate(f"tried-{peer}-{percent}") == pytest.approx(percent / 100)


@pytest.mark.parametrize(
    "best", [kind for kind, branch in study.BRANCHES.items() if not branch.has_anchor]
)
def test_any_kind_of_branch_may_turn_out_the_best(best, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "BEST", best)
    monkeypatch.setattr(study, "UNTUNED", f"@untuned-{best}-normal-mean")
    monkeypatch.setattr(study, "BEST_RATE", dict.fromkeys(study.BEST_RATE, 0.1))
    config = study.paper_small("tuning")
    for name in in_order(config.pipeline):
        resolve(name, config.pipeline[name], config, tmp_path)
    models = config.pipeline["evaluate"].config.evaluate.models
    assert models["btx"] == models[f"tuned-{best}-normal-mean-all"] == "@tried-btx-10"
    assert models["expert_wiki"] == f"@expert-{best}-wiki"


def test_seed_values_are_all_that_the_report_reads():
    report = study.paper_small("report").report
    assert report.evaluate == "runs/paper_small_0/evaluate"
    assert report.others == ("runs/paper_small_1/evaluate", "runs/paper_small_2/evaluate")


def test_an_unknown_group_is_refused():
    with pytest.raises(ConfigError, match="no such group; known: branches, main, all"):
        study.paper_small("most")


def test_branches_of_which_shared_parts_move_are_probed():
    stages = study.paper_small("tuning").pipeline
    probed = {
        name for name, stage in stages.items() if (t := stage.config.train) and t.mixing_probe
    }
    assert probed == {
        f"expert-{kind}-{expert}"
        for kind in ("full_100", "full_30", "full_10")
        for expert in study.TEXTS
    }
