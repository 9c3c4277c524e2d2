"""The study's tables, from results made so that the numbers are known."""

import json

import numpy as np
import pytest

from btx_jax.presets.study import BRANCHES, DOMAIN_OF
from btx_jax.reporting import study, study_figure

DOMAINS = ("math", "code", "world", "prose")


def model(**losses):
    return {"nats_per_token": {domain: losses.get(domain, 4.0) for domain in DOMAINS}}


def branches(barriers):
    """kind -> its barrier: experts gain 1 nat on their own domain and lose 1 on the others; their
    untuned mixture stands twice the barrier above its oracle, which stands half above the
    experts."""
    models = {"seed": model()}
    for kind, barrier in barriers.items():
        for expert, domain in DOMAIN_OF.items():
            own = dict.fromkeys(DOMAINS, 5.0) | {domain: 3.0}
            measured = {"barriers": {250: barrier / 2, 500: barrier}}
            models[f"expert-{kind}-{expert}"] = model(**own) | measured
        sent = dict.fromkeys(DOMAIN_OF.values(), 3.0 + barrier / 2)
        models[f"oracle-{kind}-mean"] = model(**sent)
        mixed = {domain: loss + 2 * barrier for domain, loss in sent.items()}
        models[f"untuned-{kind}-normal-mean"] = model(**mixed)
    return models


def test_a_branch_has_its_barrier_and_what_its_mixture_loses():
    found = study.points(branches({"full_30": 0.2}), "full_30")
    assert set(found) == set(DOMAIN_OF)
    for point in found.values():
        assert point == pytest.approx((0.2, 1.0, 0.4, 0.5))
    told = study.barrier_table([branches({"full_30": 0.2}), branches({"full_30": 0.4})])
    assert "| full_30 | 0.3 x | 0.51M | 0.150 ± " in told and "full_100" not in told
    assert "| full_30 | 0.3 x | 1.02M | 0.300 ± " in told
    assert "| full_30 | 0.200 | 1.000 | 0.400 | 0.500 |" in study.loss_table(
        [branches({"full_30": 0.2})]
    )


def test_barriers_are_what_the_branches_runs_measured(tmp_path):
    run, evaluate = tmp_path / "branch", tmp_path / "evaluate"
    run.mkdir()
    evaluate.mkdir()
    heldout = {"math": {"nats_per_token": 2.0}}
    lines = [{"step": 1, "loss": 2.0}] + [
        {"step": step, "heldout": heldout, "heldout_mixed": heldout, "barrier": barrier}
        for step, barrier in ((0, 0.0), (250, 0.1), (500, 0.2))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"evaluate": {"models": {"expert-full_30-math": str(run), "seed": "x"}}}
    (evaluate / "config.json").write_text(json.dumps(config))
    models = {"expert-full_30-math": model(), "seed": model()}
    found = study.with_barriers(models, evaluate)
    assert found["expert-full_30-math"]["barriers"] == {250: 0.1, 500: 0.2}
    assert found["seed"] == models["seed"]


def test_what_is_kept_is_a_share_of_the_experts_own_gain():
    models = branches({"full_30": 0.2})
    kept = study.kept(models, "untuned-full_30-normal-mean", "full_30")
    assert kept == pytest.approx(dict.fromkeys(DOMAIN_OF.values(), 0.5))
    assert study.kept(models, "seed", "full_30")["math"] == 0
    told = study.kept_table([models])
    assert "| full_30 | normal | mean | 50 % | 50 % | 50 % | 50 % |" in told
    assert "| full_30 | told | mean | 90 % |" in told


def test_the_rank_correlation_is_spearmans_with_an_interval():
    x = np.arange(30.0)
    assert study.rank_correlation(x, x**3) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    rng = np.random.default_rng(1)
    y = x + rng.normal(size=30) * 12
    rho, low, high = study.rank_correlation(x, y)
    assert -1 < low < rho < high < 1
    ordered = np.argsort(np.argsort(y))
    assert rho == pytest.approx(1 - 6 * ((x - ordered) ** 2).sum() / (30 * (30**2 - 1)))


def test_barriers_of_all_branches_and_seed_values_are_correlated():
    barriers = {kind: 0.1 * i for i, kind in enumerate(BRANCHES)}
    seeds = [branches(barriers), branches({kind: b + 0.01 for kind, b in barriers.items()})]
    told = study.correlation_table(seeds)
    assert f"| its oracle | 1.00 | 1.00 to 1.00 | {2 * 3 * len(BRANCHES)} |" in told
    assert study.correlation_table([branches({"full_30": 0.2})]) == "", "equal barriers order none"


def test_peers_are_compared_in_pairs():
    def seed(shift):
        return {
            "seed": model(),
            "expert-full_30-math": model(),
            "btx": {"nats_per_token": dict.fromkeys(DOMAINS, 3.0 + shift)},
            "dense": {"nats_per_token": dict.fromkeys(DOMAINS, 3.1 + shift)},
            "upcycling_flops": {"nats_per_token": dict.fromkeys(DOMAINS, 3.2 + shift)},
            "share_50": {"nats_per_token": dict.fromkeys(DOMAINS, 3.3 + shift)},
        }

    seeds = [seed(shift) for shift in (0.0, 0.5, 1.0)]
    told = study.tables(seeds)
    assert "| dense | -0.100 ± 0.000 |  |" in told, "what differs between seeds is no difference"
    assert "| 50 % | 3.800 ± 1.242 | +0.100 ± 0.000 |" in told
    assert "Barrier" not in told


def test_finetunes_and_rates_are_told():
    models = branches({"full_30": 0.2}) | {
        "tuned-full_30-normal-mean-all": model(math=1.0),
        "tried-dense-30": model(),
        "tried-dense-100": model(math=2.0),
    }
    told = study.tables([models])
    assert "| full_30 | normal | mean | all | 3.250 | -0.375 |" in told
    assert "| dense | 0.3 x | 4.000 | yes |" in told and "| dense | 1 x | 3.500 |  |" in told


def test_other_results_have_no_such_tables():
    others = ("seed", "expert_math", "btx", "dense", "upcycling_flops", "share_50")
    assert study.tables([dict.fromkeys(others, model())]) == ""


def test_the_figure_shows_what_the_tables_say():
    seeds = [branches({"full_30": barrier, "ffn_30": barrier}) for barrier in (0.2, 0.4)]
    part = study_figure.figure(seeds)
    assert "0.3 x the seed" in part and "random routers, mean" in part and "1 x" not in part
    assert "routers at random" not in part
    for models in seeds:
        models |= {"btx": model(), "btx_closed": model(math=3.0), "dense": model(math=3.5)}
    whole = study_figure.figure(seeds)
    assert "routers at random" in whole and "routers in closed form" in whole
