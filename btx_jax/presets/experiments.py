"""The comparison that supports the paper's claim: Branch-Train-MiX with its baselines and
ablations, as one pipeline of shared stages.

An arm is one or more stages that end in a model. All arms start from the same seed and train on the
same domains; the function that builds an arm says how it differs. `main` has the arms of the
paper's Tables 2 to 4, `ablations` those of its Tables 5 to 7 and others.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from btx_jax.config.allocation import SHAPES
from btx_jax.config.config import (
    Config,
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    MeshConfig,
    MixConfig,
    OracleConfig,
    PipelineStage,
    ReportConfig,
)
from btx_jax.config.model_config import LORA_TARGETS, LoRAConfig


@dataclass(frozen=True)
class Setting:
    """The settings that all arms share.

    seed: checkpoint that every arm starts from; `@seed` if `before` has a stage of that name.
    texts: expert -> its training text.
    domains: expert -> its domain.
    general: the domain of the seed, which is the generalist expert.
    mixed: the text of the finetune.
    expert, finetune: training configs of one branch and of the mixture.
    moe_cost: FLOPs of a mixture's step relative to a dense one.
    rows: held-out rows per domain.
    before: stages that precede the arms.
    lora: for MoLA's arms: total number of experts, rank of plain LoRA, adapted maps.
    """

    seed: str
    texts: dict[str, str]
    domains: dict[str, str]
    general: str
    mixed: str
    expert: Config
    finetune: Config
    moe_cost: float
    rows: int
    before: dict[str, PipelineStage] = field(default_factory=dict)
    lora: tuple[int, int, tuple[str, ...]] = (160, 42, LORA_TARGETS)

    @property
    def domain_steps(self) -> int:
        """Steps of all experts together."""
        return len(self.texts) * self.expert_steps

    @property
    def domain_text(self) -> str:
        """The training texts of all experts, combined."""
        return mixed_text(dict.fromkeys(self.texts.values(), 1.0))

    @property
    def everything(self) -> str:
        """The training texts of experts and finetune, combined in proportion to their steps."""
        return mixed_text({self.domain_text: self.domain_steps, self.mixed: self.finetune_steps})

    @property
    def dense(self) -> Config:
        """Config of dense training: the same as a branch's, but without the mixing probe."""
        assert self.expert.train
        train = dataclasses.replace(self.expert.train, mixing_probe=False)
        return dataclasses.replace(self.expert, train=train)

    @property
    def expert_steps(self) -> int:
        assert self.expert.train
        return self.expert.train.steps

    @property
    def finetune_steps(self) -> int:
        assert self.finetune.train
        return self.finetune.train.steps

    @property
    def flops(self) -> float:
        """Cost of experts and finetune together, in dense steps."""
        return self.domain_steps + self.finetune_steps * self.moe_cost

    @property
    def budgets(self) -> dict[str, tuple[int, int]]:
        """Budget -> (steps of a dense model, steps of a mixture) that spend as much as BTX: as many
        `tokens`, as many `flops`, or as much `time` with all branches training in parallel."""
        tokens = self.domain_steps + self.finetune_steps
        time = self.expert_steps + self.finetune_steps * self.moe_cost
        dense = {"tokens": tokens, "flops": self.flops, "time": time}
        return {
            name: (round(steps), round(steps if name == "tokens" else steps / self.moe_cost))
            for name, steps in dense.items()
        }


def mixed_text(shares: dict[str, float]) -> str:
    """Combine texts, each written `name:weight,...`, in proportion to their shares. Returns the
    result in the same notation, with weights that sum to 100."""
    total: dict[str, float] = {}
    for text, share in shares.items():
        weights = {
            name: float(weight or 1)
            for name, _, weight in (part.partition(":") for part in text.split(","))
        }
        for name, weight in weights.items():
            total[name] = total.get(name, 0) + share * weight / sum(weights.values())
    return ",".join(
        f"{name}:{100 * weight / sum(total.values()):.2f}" for name, weight in total.items()
    )


@dataclass
class Arms:
    """Collects the stages of the arms, and which of them are models to evaluate."""

    setting: Setting
    stages: dict[str, PipelineStage] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    ensembles: dict[str, EnsembleConfig] = field(default_factory=dict)
    oracles: dict[str, OracleConfig] = field(default_factory=dict)

    def add(
        self, name: str, config: Config, needs: tuple[str, ...] = (), is_model: bool = True
    ) -> str:
        """Add a stage and return its reference `@NAME`."""
        if self.setting.seed.startswith("@"):
            needs = (self.setting.seed[1:], *needs)
        self.stages[name] = PipelineStage(config, tuple(dict.fromkeys(needs)))
        if is_model:
            self.models[name] = f"@{name}"
        return f"@{name}"

    def train(
        self,
        name: str,
        base: Config,
        init: str,
        text: str,
        steps: int,
        is_model: bool = True,
        rng_seed: int = 0,
        **changes: Any,
    ) -> str:
        """Add a training stage: `base` with another init, text and number of steps. changes: fields
        of its train section or, as compute_KEY, of its compute section. Returns `@NAME`."""
        assert base.train and base.data and base.compute
        compute = {
            key.removeprefix("compute_"): value
            for key, value in changes.items()
            if key.startswith("compute_")
        }
        train = {key: value for key, value in changes.items() if not key.startswith("compute_")}
        steps = max(steps, 1)
        config = dataclasses.replace(
            base,
            init=init,
            model=None,
            rng_seed=rng_seed,
            data=dataclasses.replace(base.data, train=text),
            compute=dataclasses.replace(base.compute, **compute),
            train=dataclasses.replace(
                base.train,
                **{"warmup_steps": min(base.train.warmup_steps, steps)} | train,
                steps=steps,
            ),
        )
        return self.add(name, config, (init[1:],) if init.startswith("@") else (), is_model)

    def mix(
        self,
        name: str,
        sources: list[str],
        is_model: bool = False,
        data: DataConfig | None = None,
        **changes: Any,
    ) -> str:
        """Add a mix stage; returns `@NAME`. data: source of the text that a closed form reads."""
        mix = MixConfig(tuple(sources), **changes)
        config = Config("mix", mix=mix, data=data, mesh=MeshConfig())
        read = [*sources, changes.get("shared_expert", "")]
        needs = tuple(source[1:] for source in read if source.startswith("@"))
        return self.add(name, config, needs, is_model)

    def experts(self, prefix: str = "expert", steps: int = 0, is_model: bool = True) -> list[str]:
        """Add one branch per domain. Returns the experts' references: the branches, then the seed
        as the generalist."""
        s = self.setting
        steps = steps or s.expert_steps
        return [
            *(
                self.train(f"{prefix}_{name}", s.expert, s.seed, text, steps, is_model)
                for name, text in s.texts.items()
            ),
            s.seed,
        ]

    def finetune(self, name: str, mixture: str, steps: int = 0, **changes: Any) -> str:
        return self.train(
            name,
            self.setting.finetune,
            mixture,
            self.setting.mixed,
            steps or self.setting.finetune_steps,
            **changes,
        )


def main(arms: Arms) -> list[str]:
    """Add seed, experts, BTX, dense, sparse upcycling under three budgets, average and BTM. Returns
    the experts."""
    s = arms.setting
    arms.models["seed"] = s.seed
    experts = arms.experts()
    mixture = arms.mix("btx_untuned", experts, is_model=True)
    arms.finetune("btx", mixture)
    arms.mix("average", experts, is_model=True, method="average")

    on_domains = arms.train(
        "dense_domains", s.dense, s.seed, s.domain_text, s.domain_steps, is_model=False
    )
    arms.train("dense", s.dense, on_domains, s.mixed, s.finetune_steps)

    upcycled = arms.mix("upcycled", [s.seed], copies=len(experts))
    for budget, (_, steps) in s.budgets.items():
        arms.train(f"upcycling_{budget}", s.finetune, upcycled, s.everything, steps)
    btm(arms)
    return experts


def btm(arms: Arms) -> None:
    """Add Branch-Train-Merge's ensembles of the experts and the seed."""
    s = arms.setting
    members = {
        **{f"expert_{name}": domain for name, domain in s.domains.items()},
        "seed": s.general,
    }
    arms.ensembles = {
        "btm_top1": EnsembleConfig(members, "tf_idf", 1),
        "btm_top2": EnsembleConfig(members, "tf_idf", 2),
        "btm_bayes": EnsembleConfig(members, "bayes_uniform"),
        "btm_bayes_updating": EnsembleConfig(members, "bayes_updating"),
    }


def ablations(arms: Arms, experts: list[str], mixture: str = "@btx_untuned") -> None:
    """Add the ablations of the method's parts. mixture: the mixture of `experts` before finetuning.
    Routing variants are compared without load balancing, as in the paper."""
    s = arms.setting
    arms.finetune("no_balance", mixture, balance_weight=0.0)
    arms.finetune("frozen_experts", mixture, frozen="experts")
    arms.finetune("only_routers", mixture, frozen="all_but_routers")
    arms.finetune("blend", arms.mix("mix_blend", experts, method="blend"))
    for k in (2, 4):
        arms.finetune(
            f"split_top{k}", arms.mix(f"mix_split_top{k}", experts, method="split", chunks=2, k=k)
        )
    # The seed as a shared expert instead of a routed one.
    shared = arms.mix("mix_shared_seed", experts[:-1], shared_expert=s.seed)
    arms.finetune("btx_shared_seed", shared)
    switch = arms.mix("mix_switch", experts, routing="switch", k=1)
    # Dropping tokens beyond a capacity is part of Switch.
    arms.finetune(
        "switch",
        switch,
        balance_weight=0.0,
        compute_dispatch="einsum",
        compute_capacity_factor=1.5,
    )
    sample = arms.mix("mix_sample", experts, routing="sample_top1", first_routing="soft", k=1)
    arms.finetune("sample_top1", sample, balance_weight=0.0)
    arms.finetune("soft", arms.mix("mix_soft", experts, routing="soft"), balance_weight=0.0)
    # Different random seeds: branches that train on the same text must still differ.
    random = [
        arms.train(
            f"random_{i}",
            s.expert,
            s.seed,
            s.domain_text,
            s.expert_steps,
            False,
            rng_seed=1000 * (i + 1),
        )
        for i in range(len(s.texts))
    ]
    arms.finetune("random_split", arms.mix("mix_random", [*random, s.seed]))


def dense_throughout(arms: Arms) -> None:
    """Add dense training with one schedule on all texts at once."""
    s = arms.setting
    steps, _ = s.budgets["tokens"]
    arms.train("dense_throughout", s.dense, s.seed, s.everything, steps)


def lora_shapes(arms: Arms, total: int, plain_rank: int, targets: tuple[str, ...]) -> None:
    """Add MoLA's five allocations of `total` experts and plain LoRA with about as many parameters,
    each trained on all domains."""
    s = arms.setting
    arms.models["seed"] = s.seed
    variants = {shape: LoRAConfig(f"{shape}:{total}", targets=targets) for shape in SHAPES}
    variants["plain"] = LoRAConfig(
        "1", rank=(plain_rank,), k=(1,), alpha=2.0 * plain_rank, targets=targets
    )
    for name, lora in variants.items():
        arms.train(
            f"lora_{name}",
            dataclasses.replace(s.finetune, lora=lora),
            s.seed,
            s.mixed,
            s.finetune_steps,
        )


SHARES = (25, 50, 75, 100)  # % of the compute spent on experts; 0 % is the arm upcycling_flops


def compute_split(arms: Arms) -> None:
    """Add arms with the same FLOPs but different shares of them in the experts (the paper's Figure
    3). At 100 % the mixture is not finetuned."""
    s = arms.setting
    for share in SHARES:
        steps = round(s.flops * share / 100 / len(s.texts))
        mixture = arms.mix(
            f"mix_share_{share}",
            arms.experts(f"share_{share}", steps, is_model=False),
            is_model=share == 100,
        )
        if share == 100:
            arms.models["share_100"] = arms.models.pop("mix_share_100")
        else:
            arms.finetune(
                f"share_{share}", mixture, round(s.flops * (1 - share / 100) / s.moe_cost)
            )


GROUPS = ("main", "ablations", "all", "lora")


def comparison(setting: Setting, group: str, rng_seed: int = 0) -> Config:
    """A pipeline that trains, evaluates and reports a group of arms. main; ablations, which
    includes main; all, which adds the compute split; or lora (MoLA's shapes only)."""
    arms = Arms(setting)
    if group == "lora":
        lora_shapes(arms, *setting.lora)
    else:
        experts = main(arms)
    if group in ("ablations", "all"):
        ablations(arms, experts)
        dense_throughout(arms)
    if group == "all":
        compute_split(arms)
    has_experts = group != "lora"
    return evaluated(
        arms,
        tuple(f"expert_{name}" for name in setting.texts) if has_experts else (),
        "btx" if has_experts else "",
        rng_seed,
    )


def evaluated(arms: Arms, experts: tuple[str, ...], mixture: str, rng_seed: int = 0) -> Config:
    """A pipeline of the added stages, followed by evaluation and report. experts, mixture: names of
    the models in these roles."""
    setting = arms.setting
    assert setting.expert.data
    heldout = ",".join([*setting.domains.values(), setting.general])
    data = dataclasses.replace(setting.expert.data, train=setting.everything, heldout=heldout)
    evaluate = EvaluateConfig(
        arms.models,
        seed="seed",
        experts=experts,
        mixture=mixture,
        ensembles=arms.ensembles,
        oracles=arms.oracles,
        rows=setting.rows,
    )
    stages = {**setting.before, **arms.stages}
    needs = tuple(stages)
    stages["evaluate"] = PipelineStage(
        Config(
            "evaluate",
            evaluate=evaluate,
            data=data,
            compute=setting.expert.compute,
            mesh=MeshConfig(),
        ),
        needs,
    )
    runs = {name: f"@{name}" for name in (*needs, "evaluate")}
    stages["report"] = PipelineStage(
        Config("report", report=ReportConfig("@evaluate", runs)), tuple(runs)
    )
    return Config("pipeline", rng_seed=rng_seed, pipeline=stages)


# The claims of the paper's tables: (claim in words, sign, left arm, right arm, domain or "" for the
# mean). `<`: the left arm has the lower loss; `=`: the arms' scores differ by at most 0.2 points.
CLAIMS = (
    ("BTX beats its seed", "<", "btx", "seed", ""),
    ("BTX beats the maths expert", "<", "btx", "expert_math", ""),
    ("BTX beats the code expert", "<", "btx", "expert_code", ""),
    ("BTX beats the world expert", "<", "btx", "expert_wiki", ""),
    ("BTX beats dense training on the same data", "<", "btx", "dense", ""),
    ("BTX beats BTM top-1", "<", "btx", "btm_top1", ""),
    ("BTX beats BTM top-2", "<", "btx", "btm_top2", ""),
    ("BTX beats sparse upcycling on the same data", "<", "btx", "upcycling_tokens", ""),
    ("BTX beats sparse upcycling of the same FLOPs", "<", "btx", "upcycling_flops", ""),
    ("BTX beats sparse upcycling in the same time", "<", "btx", "upcycling_time", ""),
    ("finetuning the mixture helps", "<", "btx", "btx_untuned", ""),
    ("sparse upcycling beats dense training", "<", "upcycling_tokens", "dense", ""),
    ("BTX forgets less than the maths expert", "<", "btx", "expert_math", "prose"),
    ("BTX forgets less than the code expert", "<", "btx", "expert_code", "prose"),
    ("BTX forgets less than the world expert", "<", "btx", "expert_wiki", "prose"),
    ("balancing makes no difference to the score", "=", "btx", "no_balance", ""),
    ("freezing the experts makes no difference", "=", "btx", "frozen_experts", ""),
    ("blending the experts is worse", "<", "btx", "blend", ""),
    ("splitting with top-2 is worse", "<", "btx", "split_top2", ""),
    ("splitting with top-4 makes no difference", "=", "btx", "split_top4", ""),
    ("Top-2 beats Sample Top-1", "<", "no_balance", "sample_top1", ""),
    ("Sample Top-1 beats Switch", "<", "sample_top1", "switch", ""),
    ("Soft beats Top-2", "<", "soft", "no_balance", ""),
)
# The claims of MoLA's tables, in the form of CLAIMS.
LORA_CLAIMS = (
    (
        "MoLA: more experts above beat the same number everywhere",
        "<",
        "lora_inverted",
        "lora_rectangle",
        "",
    ),
    ("MoLA: more experts above beat more experts below", "<", "lora_inverted", "lora_triangle", ""),
    ("MoLA: more experts above beat more at both ends", "<", "lora_inverted", "lora_hourglass", ""),
    (
        "MoLA: more experts in the middle beat the same number everywhere",
        "<",
        "lora_diamond",
        "lora_rectangle",
        "",
    ),
    (
        "MoLA: LoRA experts beat plain LoRA of as many parameters",
        "<",
        "lora_inverted",
        "lora_plain",
        "",
    ),
)
