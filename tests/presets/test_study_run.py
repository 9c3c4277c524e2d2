"""The study from end to end, at two steps a run."""

import dataclasses
import json
import random

import pytest

from btx_jax import stages
from btx_jax.data import corpora
from btx_jax.presets import study
from btx_jax.reporting import study as tables


def at_two_steps(pipeline):
    def short(stage):
        config = stage.config
        if config.train:
            train = dataclasses.replace(config.train, steps=2, warmup_steps=1, eval_every=2)
            config = dataclasses.replace(config, train=train)
        if config.evaluate:
            few = dataclasses.replace(config.evaluate, rows=8)
            config = dataclasses.replace(config, evaluate=few)
        return dataclasses.replace(stage, config=config)

    return dataclasses.replace(
        pipeline, pipeline={name: short(stage) for name, stage in pipeline.pipeline.items()}
    )


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Corpora of words that each domain has of its own, where the study looks for them."""

    def texts(domain):
        rng = random.Random(domain)
        for _ in range(1500):
            yield " ".join(f"{domain}{rng.randrange(50)}" for _ in range(60))

    monkeypatch.setattr(corpora, "texts", texts)
    monkeypatch.setattr(corpora, "VOCAB_SIZE", 300)
    monkeypatch.chdir(tmp_path)
    corpora.write(tmp_path / corpora.DIRECTORY)


@pytest.mark.slow
@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("branches", ("## Barrier", "What mixing loses", "Rank correlation", "Share of each")),
        ("tuning", ("minus its peers", "finetuned", "Learning rates", "Split of the compute")),
    ],
)
def test_every_arm_runs_and_is_reported(group, parts, tmp_path, monkeypatch):
    kinds = {kind: study.BRANCHES[kind] for kind in (study.BEST, "full_30", "anchor_30")}
    for module in (study, tables):
        monkeypatch.setattr(module, "BRANCHES", kinds)
    monkeypatch.setattr(study, "ROUTERS", study.ROUTERS[:2])
    monkeypatch.setattr(study, "MERGES", study.MERGES[:2])
    config = at_two_steps(study.paper_small(group))
    stages.run(config, tmp_path / "out")
    told = (tmp_path / "out" / "study.md").read_text()
    assert (tmp_path / "out" / "study.svg").read_text().startswith("<svg")
    assert all(part in told for part in parts) and "nan" not in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(config.pipeline["evaluate"].config.evaluate.models) <= set(summary["models"])
