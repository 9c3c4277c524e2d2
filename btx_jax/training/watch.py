"""Early warnings about a run: too many dropped tokens, a start that undoes pretraining, and a
branch that can no longer be mixed."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

DROPPED = 0.05  # share of routed claims above which training is known to suffer
DROPPED_STEPS = 10  # number of steps whose mean is compared with DROPPED
FIRST_STEPS = 100
RISE = 0.5  # nats per token: more than the spread between batches; from scratch the loss only falls
ASKED_EVERY = 10  # minimum number of steps between held-out evaluations made only for this check
RISEN_STEPS = 3  # consecutive steps, so that a single hard batch does not warn
BARRIER = 0.1  # nats per token (training.probe.barrier)


def dropped_warning(share: float) -> str:
    return (
        f"{share:.0%} of the routed tokens exceed their expert's capacity and are dropped; set"
        " config.compute.dispatch='ragged' to drop none, or raise"
        " config.compute.capacity_factor to drop fewer"
    )


class Dropped:
    """Warns once, when the mean share of dropped claims over the last steps is too high."""

    def __init__(self, steps: int):
        """steps: length of the run, which may be short."""
        self._shares: deque[float] = deque(maxlen=min(DROPPED_STEPS, steps))
        self._said = False

    def add(self, share: float) -> str:
        """Add a step's share of dropped claims; return a warning or ""."""
        self._shares.append(share)
        full = len(self._shares) == self._shares.maxlen
        if self._said or not full or mean(self._shares) <= DROPPED:
            return ""
        self._said = True
        return dropped_warning(mean(self._shares))


class FirstSteps:
    """Warns once, when the loss within the first steps rises far above its initial value.

    The loss of step 1 is that of the initial weights. Batches differ, so several in a row must
    exceed it: by RISE where held-out losses are measured too, otherwise by twice RISE. Held-out,
    every domain must exceed its own initial loss by RISE, since learning one domain may well mean
    forgetting another.
    """

    def __init__(self, learning_rate: float, losses: Sequence[float] = ()):
        """learning_rate: the peak rate, for the message. losses: those of the steps before a
        resume."""
        self._rate, self._losses, self._said = learning_rate, list(losses), False
        self._ask_from = 0

    def add(
        self, step: int, loss: float, heldout: Callable[[], Mapping[str, tuple[float, float]]]
    ) -> str:
        """Add a step; return a warning or "".

        loss: training loss of this step's batch. heldout: returns domain -> (initial loss, current
        loss), or {} when not measured; called only when the batch losses look bad.
        """
        self._losses.append(loss)
        if self._said or not RISEN_STEPS < len(self._losses) == step <= FIRST_STEPS:
            return ""
        before, now = self._losses[0], min(self._losses[-RISEN_STEPS:])
        if now < before + RISE:
            return ""
        if step < self._ask_from:
            return ""
        self._ask_from = step + ASKED_EVERY
        domains = heldout()
        if domains:
            return self.compare(step, domains)
        return self._warning(step, "training", before, now) if now >= before + 2 * RISE else ""

    def compare(self, step: int, heldout: Mapping[str, tuple[float, float]]) -> str:
        """Check held-out losses alone, domain -> (initial, current); return a warning or ""."""
        if self._said or step > FIRST_STEPS or not heldout:
            return ""
        if not all(now >= before + RISE for before, now in heldout.values()):
            return ""
        starts, ends = zip(*heldout.values(), strict=True)
        return self._warning(step, "held-out", mean(starts), mean(ends))

    def _warning(self, step: int, kind: str, before: float, now: float) -> str:
        self._said = True
        return (
            f"step {step}: the {kind} loss has risen from {before:.2f} to {now:.2f} nats per"
            f" token: the learning rate of {self._rate:g} is destroying what these weights have"
            " learnt; stop, lower config.train.learning_rate (0 chooses one for the initial"
            " model) and start again in another --workdir"
        )


class Basin:
    """Warns once, when a branch has left its seed's basin: averaging the shared parameters with the
    seed's then loses more than mixing gains. Branches of a seed with little training always leave
    it: a learning rate low enough to stay near the seed would teach them nothing."""

    def __init__(self, is_pretrained: bool):
        """is_pretrained: whether the seed counts as pretrained (`training.start.is_pretrained`)."""
        self._is_pretrained, self._said = is_pretrained, False

    def add(self, step: int, barrier: float) -> str:
        """Check the barrier measured at a step (`training.probe.barrier`), in nats per token;
        return a warning or ""."""
        if self._said or barrier <= BARRIER:
            return ""
        self._said = True
        told = (
            f"step {step}: mixing barrier {barrier:.2f} nats per token: this branch has left the"
            " seed's basin"
        )
        if self._is_pretrained:
            return (
                f"{told}; lower config.train.learning_rate or freeze the shared parameters"
                " (config.train.frozen='shared')"
            )
        return (
            f"{told}, as is usual after little training of the seed; merge shared parameters"
            " with config.mix.merge='regmean' (`btx new` sets it), which loses less than the"
            " mean, and finetune; a seed that was trained longer keeps its branches closer"
        )
