"""Branches with an anchor (Branch-Adapt-Route), as functions that config files call."""

import dataclasses
from typing import Any

from btx_jax.config.config import Config, MeshConfig, MixConfig, PipelineStage
from btx_jax.presets.recipes import LLAMA2, btx

# The runs of a branch, in order: (TrainConfig.frozen, share of the branch's steps).
SCHEDULE = (("shared", 0.5), ("shared_layers", 0.3), ("anchor", 0.2))
# Training of the mixture's routers: steps as a share of `btx`'s finetune, and FlexOlmo's peak rate.
ROUTERS, ROUTER_RATE = 0.1, 2e-3


def bar(what: str = LLAMA2) -> Config:
    """Branch-Adapt-Route (arXiv 2604.18473): the `btx` pipeline, but branches train with an anchor
    and are unfrozen in stages. Their shared parameters are averaged, and then only the mixture's
    routers are trained."""
    stages: dict[str, PipelineStage] = {}
    for name, stage in (btx(what).pipeline or {}).items():
        if name.startswith("expert_"):
            stages |= _branch(name, stage)
        else:
            stages[name] = stage
    experts = tuple(f"@{name}" for name in stages["mix"].needs if name.startswith("expert_"))
    mix = Config("mix", mix=MixConfig(experts), mesh=MeshConfig())
    stages["mix"] = dataclasses.replace(stages["mix"], config=mix)
    tuned = stages["finetune"]
    routers = _trained(tuned.config, ROUTERS, frozen="all_but_routers", learning_rate=ROUTER_RATE)
    stages["finetune"] = dataclasses.replace(
        tuned, config=dataclasses.replace(routers, model=None, mesh=MeshConfig())
    )
    runs = {name: f"@{name}" for name in stages if name != "report"}
    told = stages["report"].config
    assert told.report
    told = dataclasses.replace(told, report=dataclasses.replace(told.report, runs=runs))
    stages["report"] = PipelineStage(told, needs=tuple(runs))
    return Config("pipeline", pipeline=stages)


def _branch(name: str, stage: PipelineStage) -> dict[str, PipelineStage]:
    """The runs of a branch, each starting from the previous one; the last has the branch's name."""
    beside = {"anchor": True, "balance_weight": 0.0, "z_loss_weight": 1e-3}
    names = [f"{name}_{frozen}" for frozen, _ in SCHEDULE[:-1]] + [name]
    stages: dict[str, PipelineStage] = {}
    for own, (frozen, share) in zip(names, SCHEDULE, strict=True):
        config, needs = _trained(stage.config, share, frozen=frozen, **beside), stage.needs
        if stages:
            before = next(reversed(stages))
            config = dataclasses.replace(config, init=f"@{before}", model=None)
            needs = (before,)
        stages[own] = PipelineStage(config, needs)
    return stages


def _trained(config: Config, share: float, **changes: Any) -> Config:
    """The same run with `share` of its steps, and with other changes to its train section."""
    assert config.train
    for key in ("steps", "warmup_steps"):
        changes[key] = max(1, round(share * getattr(config.train, key)))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
