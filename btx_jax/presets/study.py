"""When does mixing pay off? The study reported in docs/results.md, at a million parameters. It
measures what branches lose when they are mixed, depending on how far they moved from the seed and
how they are mixed, and compares Branch-Train-MiX at its best with tuned peers.

A seed is trained on 20M tokens, so that branches of 1M tokens start from a model that has learnt
much. No text is seen twice: seed, branches and finetunes each use their own parts of the corpora
that `python -m btx_jax.data.corpora` makes. Learning rates are given as fractions of the seed's
peak rate.

The name of an arm says what it is, in parts separated by dashes: `expert-BRANCH-EXPERT`,
`untuned-BRANCH-ROUTER-MERGE`, `oracle-BRANCH-MERGE`, `tuned-BRANCH-ROUTER-MERGE-WHAT`,
`tried-PEER-RATE`. Rates in names are in percent.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    OracleConfig,
    PipelineStage,
    TrainConfig,
)
from btx_jax.config.merges import COPY, REGMEAN
from btx_jax.config.model_config import MoEConfig
from btx_jax.config.ridge import RIDGE, SOLVED
from btx_jax.costs.model import train_flops
from btx_jax.data.corpora import DIRECTORY, PARTS, SHARES, TOKENIZER
from btx_jax.errors import ConfigError
from btx_jax.presets.experiments import (
    Arms,
    Setting,
    ablations,
    btm,
    compute_split,
    evaluated,
)
from btx_jax.presets.recipes import MODELS, TINY, reported

MODEL = MODELS[TINY]
MIXTURE = dataclasses.replace(MODEL, moe=MoEConfig((4,) * MODEL.layers))
MIXTURE_COST = train_flops(MIXTURE, 1) / train_flops(MODEL, 1)  # per token, relative to dense
DOMAINS = tuple(SHARES)
SEED_TEXT = "prose_seed:42,code_seed:33,math_seed:22.5,world_seed:2.5"
# Expert -> its text, a little of which is general text, as in the paper; and expert -> its domain.
TEXTS = {
    "math": "math_branch:94.99,prose_branch:5.01",
    "code": "code_branch:93.07,prose_branch:6.93",
    "wiki": "world_branch:90.91,prose_branch:9.09",
}
DOMAIN_OF = {"math": "math", "code": "code", "wiki": "world"}
GENERAL = "prose"  # domain of the seed, which stays an expert
# All domains have equal weight in the evaluation, and therefore in the finetune's text.
MIXED = ",".join(f"{domain}_finetune:25" for domain in DOMAINS)

TOKENS = 8 * 256  # per step
SEED_STEPS = 9800
SEED_RATE = 1.5e-3  # 4.73 nats after 200 of 400 steps; half this rate gives 4.87, twice 4.83
BRANCH_STEPS = FINETUNE_STEPS = 500


OWN = "own"  # routers made of the rows that the branches were trained with
# Training of branches with an anchor, as in FlexOlmo.
BESIDE_ANCHOR: Mapping[str, Any] = {
    "frozen": "shared", "anchor": True, "balance_weight": 0.0, "z_loss_weight": 1e-3
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Branch:
    """A kind of branch. rate: its peak learning rate, as a fraction of the seed's peak. train:
    other changes to its train section."""

    rate: float
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether training leaves the parameters that branches share unchanged, so that there is
        nothing to merge."""
        return bool(self.train)

    @property
    def has_anchor(self) -> bool:
        """Whether the branch trains with the seed's feed-forwards as its anchor, and so with a
        router row of its own."""
        return bool(self.train.get("anchor"))

    @property
    def routers(self) -> tuple[str, ...]:
        """The ways in which the routers of its mixtures are initialised."""
        return (OWN,) if self.has_anchor else ROUTERS


BRANCHES = {
    "full_100": Branch(1.0),
    "full_30": Branch(0.3),
    "full_10": Branch(0.1),
    "ffn_100": Branch(1.0, {"frozen": "shared"}),
    "ffn_30": Branch(0.3, {"frozen": "shared"}),
    "anchor_100": Branch(1.0, BESIDE_ANCHOR),
    "anchor_30": Branch(0.3, BESIDE_ANCHOR),
}
ROUTERS = ("normal", *SOLVED)
MERGES = ("mean", REGMEAN, "ties", COPY)
FROM_SEED = ("ties", COPY)  # merges that read the seed
# Name of a way to finetune a mixture -> changes to the train section.
WHAT: Mapping[str, Mapping[str, Any]] = {"all": {}, "routers": {"frozen": "all_but_routers"}}

# Choices made with the first seed value: rates by the arms `tried-PEER-RATE`, branches (BEST) by
# the untuned mixtures.
RATES = (1.0, 0.3, 0.1)
BEST_RATE = {"btx": 0.3, "dense": 0.3, "upcycling": 0.3}
# Peer -> its name among the paper's arms, trained on as many tokens as BTX.
PEERS = {"btx": "btx", "dense": "dense", "upcycling": "upcycling_tokens"}
BEST = "ffn_100"  # kind of the branches that btx mixes; they have no anchor
UNTUNED = f"@untuned-{BEST}-{ROUTERS[0]}-{MERGES[0]}"  # as in the paper

GROUPS = ("branches", "main", "all", "tuning")


def _data(train: str) -> DataConfig:
    files = {
        domain: {f"{domain}_{part}": f"{DIRECTORY}/{part}/{domain}.jsonl.gz" for part in PARTS}
        for domain in DOMAINS
    }
    # Under its own name, a domain is evaluated on the held-out text of all its parts.
    whole = {domain: ",".join(parts.values()) for domain, parts in files.items()}
    return DataConfig(
        train,
        heldout=",".join(DOMAINS),
        domains=whole | {name: file for parts in files.values() for name, file in parts.items()},
        tokenizer=f"{DIRECTORY}/{TOKENIZER}",
        sequence_length=256,
        heldout_fraction=0.05,
    )


def _training(train: str, steps: int, rate: float, **changes: Any) -> Config:
    """A training config. rate: peak learning rate, as a fraction of the seed's peak."""
    given = {"batch_size": 8, "warmup_steps": 20, "eval_every": 125, "eval_rows": 32} | changes
    return Config(
        "train",
        compute=ComputeConfig(
            dtype="float32", remat="none", unroll=4, group_size=64, loss_chunk=512
        ),
        train=TrainConfig(steps, learning_rate=rate * SEED_RATE, **given),
        data=_data(train),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(every=250),
    )


def _seed() -> Config:
    config = _training(SEED_TEXT, SEED_STEPS, 1.0, warmup_steps=200, eval_every=500)
    return dataclasses.replace(config, init="scratch", model=MODEL)


def _setting() -> Setting:
    return Setting(
        seed="@seed",
        texts=TEXTS,
        domains=DOMAIN_OF,
        general=GENERAL,
        mixed=MIXED,
        expert=_training("", BRANCH_STEPS, BRANCHES[BEST].rate, **BRANCHES[BEST].train),
        finetune=_training(MIXED, FINETUNE_STEPS, BEST_RATE["btx"]),
        moe_cost=MIXTURE_COST,
        rows=128,
        before={"seed": PipelineStage(_seed())},
    )


def _branches(arms: Arms) -> dict[str, list[str]]:
    """Add branches of every kind, their mixtures before finetuning, and oracles, which route the
    tokens of each domain to its expert. Returns kind -> its experts."""
    s = arms.setting
    arms.models["seed"] = s.seed
    experts: dict[str, list[str]] = {}
    for kind, branch in BRANCHES.items():
        probed = {"mixing_probe": not branch.is_exact}
        base = _training("", BRANCH_STEPS, branch.rate, **probed, **branch.train)
        experts[kind] = [
            arms.train(f"expert-{kind}-{name}", base, s.seed, text, BRANCH_STEPS)
            for name, text in s.texts.items()
        ]
        if not branch.has_anchor:
            experts[kind].append(s.seed)
        for merge in _merges(kind):
            for router in branch.routers:
                _mixture(arms, kind, experts[kind], router, merge)
            sent = {domain: number for number, domain in enumerate(DOMAIN_OF.values())}
            arms.oracles[f"oracle-{kind}-{merge}"] = OracleConfig(
                f"untuned-{kind}-{branch.routers[0]}-{merge}", sent | {GENERAL: len(sent)}
            )
    return experts


def _merges(kind: str) -> tuple[str, ...]:
    """The ways to merge what branches of this kind share. One suffices if it is unchanged, since
    all ways then give the same."""
    return MERGES[:1] if BRANCHES[kind].is_exact else MERGES


def _closed_form(kind: str) -> tuple[str, str]:
    """(router, merge) that are solved from text; where there is nothing to merge, the plain
    mean."""
    return RIDGE, REGMEAN if REGMEAN in _merges(kind) else MERGES[0]


def _trained_on(kind: str) -> tuple[tuple[str, str], ...]:
    """(router, merge) of the mixtures that are finetuned: the paper's and the closed form's, or,
    with an anchor, the branches' own routers. Combinations in between are compared only without
    finetuning."""
    if BRANCHES[kind].has_anchor:
        return ((OWN, MERGES[0]),)
    return (ROUTERS[0], MERGES[0]), _closed_form(kind)


def _mixture(arms: Arms, kind: str, experts: list[str], router: str, merge: str) -> None:
    read: dict[str, Any] = {"base": arms.setting.seed} if merge in FROM_SEED else {}
    if router in SOLVED or merge == REGMEAN:
        read["data"] = _data(MIXED)
        read["text"] = tuple(f"{domain}_branch" for domain in (*DOMAIN_OF.values(), GENERAL))
    name = f"untuned-{kind}-{router}-{merge}"
    start = "normal" if router == OWN else router
    arms.mix(name, experts, is_model=True, router=start, merge=merge, **read)


def _peers(arms: Arms) -> None:
    """Add BTX, dense training and sparse upcycling, each at its best rate, and Drop-Upcycling. The
    peers get as many tokens as BTX; dense training and sparse upcycling also as many FLOPs, and as
    much time as BTX with its branches in parallel."""
    s = arms.setting
    copies = len(s.texts) + 1
    upcycled = arms.mix("upcycled", [s.seed], copies=copies)
    dropped = arms.mix("drop_upcycled", [s.seed], copies=copies, reinit=0.5)
    # Under the names that the paper's arms have in `experiments`.
    for name in s.texts:
        arms.models[f"expert_{name}"] = f"@expert-{BEST}-{name}"
    arms.models["btx_untuned"] = UNTUNED
    for peer, name in PEERS.items():
        arms.models[name] = _at_rate(arms, peer, BEST_RATE[peer])
    closed = "-".join(_closed_form(BEST))
    arms.finetune("btx_closed", f"@untuned-{BEST}-{closed}")
    dense, upcycling = (
        _training("", BRANCH_STEPS, BEST_RATE[peer]) for peer in ("dense", "upcycling")
    )
    for budget in ("flops", "time"):
        steps, mixture_steps = s.budgets[budget]
        arms.train(f"dense_{budget}", dense, s.seed, s.everything, steps)
        arms.train(f"upcycling_{budget}", upcycling, upcycled, s.everything, mixture_steps)
    arms.train("drop_upcycling", upcycling, dropped, s.everything, s.budgets["tokens"][1])
    btm(arms)


def _at_rate(arms: Arms, peer: str, rate: float) -> str:
    """Add BTX at this peak rate, or one of its peers on as many tokens, unless it has been added
    already. Returns its reference."""
    s = arms.setting
    name = f"tried-{peer}-{round(100 * rate)}"
    if name in arms.stages:
        return f"@{name}"
    if peer == "btx":
        return arms.finetune(name, UNTUNED, learning_rate=rate * SEED_RATE)
    init, number = (s.seed, 0) if peer == "dense" else ("@upcycled", 1)
    base = _training("", BRANCH_STEPS, rate)
    return arms.train(name, base, init, s.everything, s.budgets["tokens"][number])


def _finetunes(arms: Arms) -> None:
    """Add the finetunes of every kind of branch, for each mixture in `_trained_on`: of all
    parameters, and of the routers alone."""
    for kind in BRANCHES:
        for (router, merge), (what, train) in itertools.product(_trained_on(kind), WHAT.items()):
            untuned = f"untuned-{kind}-{router}-{merge}"
            name = f"tuned{untuned.removeprefix('untuned')}-{what}"
            if f"@{untuned}" == UNTUNED and not train:
                arms.models[name] = arms.models["btx"]
            else:
                arms.finetune(name, f"@{untuned}", **train)


def paper_small(group: str = "main") -> Config:
    """A pipeline of a group of arms; each group includes the preceding ones. branches: what
    branches lose when they are mixed. main: BTX and its peers. all: the paper's other arms and the
    split of compute. tuning: every finetune and every rate. `report`: a report of three seed
    values, the first of `tuning`, the others of `all`."""
    if group == "report":
        return reported("paper_small", paper_small(GROUPS[-1]))
    if group not in GROUPS:
        raise ConfigError(f"{group}: no such group; known: {', '.join(GROUPS)}, report")
    arms = Arms(_setting())
    wanted = GROUPS[: GROUPS.index(group) + 1]
    experts = _branches(arms)
    if "main" in wanted:
        _peers(arms)
    if "all" in wanted:
        ablations(arms, experts[BEST], UNTUNED)
        compute_split(arms)
    if "tuning" in wanted:
        _finetunes(arms)
        for peer in PEERS:
            for rate in RATES:
                _at_rate(arms, peer, rate)
    if "main" not in wanted:
        return evaluated(arms, (), "")
    return evaluated(arms, tuple(f"expert_{name}" for name in TEXTS), "btx")
