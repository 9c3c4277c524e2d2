"""When does mixing pay? The tables of presets.study, from its evaluations, one per seed value, and
from what its branches measured while they trained. Arms without results are left out, so that a
partial study has tables too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from btx_jax.paths import to_path
from btx_jax.presets.experiments import SHARES
from btx_jax.presets.study import BEST_RATE, BRANCHES, DOMAIN_OF, ROUTERS, TOKENS
from btx_jax.reporting.compare import CONFIDENCE, interval, mean_loss
from btx_jax.reporting.metrics import read_metrics
from btx_jax.reporting.summary import probe_points
from btx_jax.rundir import recorded_config

Models = Mapping[str, Any]  # from one results.json; branches also have `barriers`: step -> nats
RESAMPLES = 10_000  # bootstrap resamples for the interval of a rank correlation
BRANCH = "expert-"  # prefix of the names of branches, used in the study only
PEERS = (
    *("dense", "dense_flops", "dense_time"),
    *("upcycling_tokens", "upcycling_flops", "upcycling_time", "drop_upcycling"),
    *("btm_top1", "btm_top2", "btm_bayes", "btm_bayes_updating"),
)


class Point(NamedTuple):
    """One branch of one seed value, nats per token.

    barrier: from the branch's last mixing probe. The others are differences of losses on the
    branch's own domain. gain: seed minus branch. above_oracle: the untuned mixture with random
    routers minus the same mixture with oracle routing. above_expert: that untuned mixture minus the
    branch.
    """

    barrier: float
    gain: float
    above_oracle: float
    above_expert: float


def tables(seeds: Sequence[Models]) -> str:
    """All tables that these results contain, as Markdown; "" where they are not the study's."""
    if not names(seeds, (BRANCH,)):
        return ""
    parts = (barrier_table, loss_table, correlation_table, kept_table, peer_table, tuned_table)
    made = (part(seeds) for part in (*parts, rate_table, split_table))
    return "\n".join(table for table in made if table)


def loss(models: Models, name: str, domain: str) -> float:
    return float(models[name]["nats_per_token"][domain])


def with_barriers(models: Models, evaluate: Path) -> Models:
    """The models of the evaluation, with the barriers that their runs measured. At step 0, where a
    branch is its seed, there is none."""
    found = dict(models)
    paths = recorded_config(evaluate).get("evaluate", {}).get("models", {})
    for name in models:
        if name.startswith(BRANCH):
            lines = read_metrics(to_path(paths[name], f"config.evaluate.models.{name}"))
            barriers = {step: barrier for step, *_, barrier in probe_points(lines) if step}
            found[name] = models[name] | {"barriers": barriers}
    return found


def points(models: Models, kind: str) -> dict[str, Point]:
    """Expert -> its Point, for every branch of a kind that measured its barrier."""
    found = {}
    mixture, oracle = f"untuned-{kind}-{ROUTERS[0]}-mean", f"oracle-{kind}-mean"
    for expert, domain in DOMAIN_OF.items():
        branch = f"expert-{kind}-{expert}"
        barriers = models.get(branch, {}).get("barriers")
        if not barriers or not {mixture, oracle} <= set(models):
            continue
        own, mixed = loss(models, branch, domain), loss(models, mixture, domain)
        found[expert] = Point(
            barriers[max(barriers)],
            loss(models, "seed", domain) - own,
            mixed - loss(models, oracle, domain),
            mixed - own,
        )
    return found


def barriers(seeds: Sequence[Models]) -> dict[str, dict[int, list[float]]]:
    """Kind of branch -> step -> one barrier per seed value, the mean over the kind's experts. Kinds
    without a measured barrier are left out."""
    found: dict[str, dict[int, list[float]]] = {}
    for kind in BRANCHES:
        by_step: dict[int, list[float]] = {}
        for models in seeds:
            own = [models.get(f"expert-{kind}-{expert}", {}) for expert in DOMAIN_OF]
            measured = [model["barriers"] for model in own if model.get("barriers")]
            for step in measured[0] if measured else ():
                by_step.setdefault(step, []).append(
                    float(np.mean([each[step] for each in measured if step in each]))
                )
        if by_step:
            found[kind] = dict(sorted(by_step.items()))
    return found


def barrier_table(seeds: Sequence[Models]) -> str:
    """Barriers against learning rate and length."""
    rows = [
        [kind, f"{BRANCHES[kind].rate:g} x", f"{step * TOKENS / 1e6:.2f}M", number(values)]
        for kind, by_step in barriers(seeds).items()
        for step, values in by_step.items()
    ]
    return table("Barrier", ("branch", "rate, of the seed's peak", "tokens", "barrier"), rows)


def loss_table(seeds: Sequence[Models]) -> str:
    """What experts gain and their untuned mixture loses, for every kind of branch, means over its
    experts."""
    rows = []
    for kind in BRANCHES:
        found = [list(points(models, kind).values()) for models in seeds]
        if any(found):
            means = [np.mean(own, axis=0) for own in found if own]
            rows.append([kind, *(number([float(m[i]) for m in means]) for i in range(4))])
    columns = (
        "branch",
        "barrier",
        "gain of the experts",
        "mixture above its oracle",
        "mixture above the experts",
    )
    return table("What mixing loses", columns, rows)


def kept(models: Models, name: str, kind: str) -> dict[str, float]:
    """Domain -> the share of its expert's gain over the seed that a model keeps."""
    found = {}
    for expert, domain in DOMAIN_OF.items():
        seed = loss(models, "seed", domain)
        gain = seed - loss(models, f"expert-{kind}-{expert}", domain)
        found[domain] = (seed - loss(models, name, domain)) / gain
    return found


def kept_table(seeds: Sequence[Models]) -> str:
    rows = []
    for name in names(seeds, ("untuned-", "oracle-")):
        what, kind, *how = name.split("-")
        shares = [kept(models, name, kind) for models in seeds if name in models]
        losses = [mean_loss(models[name]) for models in seeds if name in models]
        rows.append(
            [
                kind,
                *(("told", *how) if what == "oracle" else how),
                *(percent([share[d] for share in shares]) for d in DOMAIN_OF.values()),
                percent([float(np.mean(list(share.values()))) for share in shares]),
                number(losses),
            ]
        )
    return table(
        "Share of each expert's gain that the untuned mixture keeps",
        ("branch", "router", "merge", *DOMAIN_OF.values(), "mean", "loss, mean of all domains"),
        rows,
    )


def correlation_table(seeds: Sequence[Models]) -> str:
    """Spearman's correlation over all branches of all seed values, with a percentile bootstrap
    interval, as if the branches of a seed value were independent."""
    found = [
        point for models in seeds for kind in BRANCHES for point in points(models, kind).values()
    ]
    rows = []
    for told, key in (("its oracle", "above_oracle"), ("the expert itself", "above_expert")):
        x = np.array([point.barrier for point in found])
        y = np.array([getattr(point, key) for point in found])
        if len(found) < 3 or not np.ptp(x) or not np.ptp(y):
            continue
        rho, low, high = rank_correlation(x, y)
        rows.append([told, f"{rho:.2f}", f"{low:.2f} to {high:.2f}", str(len(found))])
    return table(
        "Rank correlation of the barrier with the loss of the untuned mixture",
        ("above", "Spearman's rho", "95 % interval", "branches"),
        rows,
    )


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(rho, lower and upper end of its interval). Resamples that contain a single value have no
    rank correlation and are skipped."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        at = rng.integers(len(x), size=len(x))
        if np.ptp(x[at]) and np.ptp(y[at]):
            found.append(_spearman(x[at], y[at]))
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return _spearman(x, y), float(low), float(high)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = stats.rankdata([x, y], axis=1)
    return float(np.corrcoef(ranks)[0, 1])


def peer_table(seeds: Sequence[Models]) -> str:
    """BTX minus its peers, in pairs within a seed value: negative favours BTX."""
    rows = []
    for peer in PEERS:
        cells = []
        for name in ("btx", "btx_closed"):
            cells.append(number(paired(seeds, name, peer), "+.3f"))
        if any(cells):
            rows.append([peer, *cells])
    return table(
        "Branch-Train-MiX minus its peers",
        ("peer", "routers at random", "routers in closed form"),
        rows,
    )


def tuned_table(seeds: Sequence[Models]) -> str:
    rows = []
    for name in names(seeds, ("tuned-",)):
        start = f"un{name.rpartition('-')[0]}"
        gained = number(paired(seeds, name, start), "+.3f")
        rows.append([*name.split("-")[1:], number(losses(seeds, name)), gained])
    return table(
        "Mixtures, finetuned",
        ("branch", "router", "merge", "trained", "loss", "minus untuned"),
        rows,
    )


def rate_table(seeds: Sequence[Models]) -> str:
    rows = []
    for peer in BEST_RATE:
        for name in names(seeds, (f"tried-{peer}-",)):
            rate = int(name.rpartition("-")[2]) / 100
            chosen = "yes" if rate == BEST_RATE[peer] else ""
            rows.append([peer, f"{rate:g} x", number(losses(seeds, name)), chosen])
    return table("Learning rates", ("arm", "rate, of the seed's peak", "loss", "chosen"), rows)


def split_table(seeds: Sequence[Models]) -> str:
    """Loss against the share of the FLOPs, whose total is fixed, that is spent in the experts; 0 is
    upcycling."""
    arms = {0: "upcycling_flops"} | {share: f"share_{share}" for share in SHARES}
    rows = [
        [f"{share} %", number(losses(seeds, arm)), number(paired(seeds, arm, arms[0]), "+.3f")]
        for share, arm in arms.items()
        if losses(seeds, arm)
    ]
    return table(
        "Split of the compute", ("in the experts", "loss", "minus 0 %"), rows if rows[1:] else []
    )


def paired(seeds: Sequence[Models], left: str, right: str) -> list[float]:
    """left minus right for every seed value that has both."""
    return [
        mean_loss(models[left]) - mean_loss(models[right])
        for models in seeds
        if {left, right} <= set(models)
    ]


def losses(seeds: Sequence[Models], name: str) -> list[float]:
    return [mean_loss(models[name]) for models in seeds if name in models]


def names(seeds: Sequence[Models], prefixes: tuple[str, ...]) -> list[str]:
    found = dict.fromkeys(name for models in seeds for name in models)
    return [name for name in found if name.startswith(prefixes)]


def number(values: Sequence[float], form: str = ".3f") -> str:
    """The values' mean with its interval; "" for none."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def percent(shares: Sequence[float]) -> str:
    mean, half = interval([100 * share for share in shares])
    return f"{mean:.0f}" + (f" ± {half:.0f} %" if len(shares) > 1 else " %")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; "" without rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
