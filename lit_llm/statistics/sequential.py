"""Seeds in rounds: go on only where the difference is not decided yet, without more false alarms for the looking.

Whoever looks at 5% after every round finds a difference that is not there far more often than in one of twenty studies.
Here the 5% are spent over the looks (`lit_llm.statistics.alpha_spending`). With several arms under one family-wise
level, each arm has its equal share of the 5% (Bonferroni), spent over its looks: valid whatever the arms share.

Seeds are added by one metric, of the validation split, and the table is of another, of the test split, at the looks
where the first has stopped each arm. The level of a look and its p-value (`repeated_p`) hold whatever has stopped it.

A difference that stopped the rounds early is too large on average. The bias-adjusted estimate beside it is unbiased
over all ways in which the looks can end (Emerson and Fleming 1990, Biometrika 77).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from lit_llm.statistics.alpha_spending import PastLooks, Rounds, chain, pocock_spending
from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.multiple_comparisons import two_sided_p
from lit_llm.statistics.paired import Values
from lit_llm.statistics.verdicts import LEVEL, Judgement, Levels, judgements

__all__ = ["ArmStatus", "LookRule", "PastLooks", "Rounds", "arm_statuses", "judged_where_they_stand", "pocock_spending"]

OPEN = ("undecided", "not enough seeds")
"""Verdicts that decide nothing: without a margin, and with one."""


@dataclass(frozen=True)
class ArmStatus:
    """Where an arm stands."""

    seeds: int
    """So many, the first of the list, have been looked at: those of the last look, or those that decided."""
    judgement: Judgement | None
    """By the level of that look; its p counts the looks. None while the first round is not over."""
    decided: bool
    more: int
    """Seeds to run it with next, counted from the first of the list; `seeds` where it is done."""
    look: int = 0
    """Number of that look, counted from zero."""
    differences: tuple[float, ...] = ()
    """From the baseline, seed by seed, as that look saw them."""


@dataclass(frozen=True)
class LookRule:
    """How arms are judged at each look."""

    metric: str
    seeds: Sequence[int]
    """In the order in which they are added, `rounds.most` or more."""
    rounds: Rounds
    margin: float | None = None
    comparisons: int = 1
    """Arms that share the 5%, those of other baselines included."""
    noise: Noise = field(default_factory=Noise)

    def judged(
        self, values: Mapping[str, Values], arms: Sequence[str], baseline: str, look: int
    ) -> dict[str, Judgement]:
        """Judgements of arms that have one baseline, by the seeds and the level of a look."""
        levels = round_levels(self.rounds, self.comparisons)
        # A look for which nothing of the 5% is left decides nothing; it is shown with the last interval that could.
        usable = next((own for own in reversed(levels[: look + 1]) if own.difference), Levels())
        now = self.seeds[: self.rounds.sizes[look]]
        block = {arm: {s: values[arm][s] for s in now if s in values[arm]} for arm in (*arms, baseline)}
        differences = block_differences(block, baseline, self.noise)
        found = judgements(differences, dict.fromkeys(block, baseline), self.metric, margin=self.margin, levels=usable)
        if not levels[look].difference:
            undecided = OPEN[0] if self.margin is None else OPEN[1]
            found = {arm: replace(own, verdict=undecided) for arm, own in found.items()}
        return {
            arm: own if own.p is None else replace(own, p=repeated_p(own.p, look, self.rounds, self.comparisons))
            for arm, own in found.items()
        }


def arm_statuses(
    values: Mapping[str, Values], baseline: str, rule: LookRule, lost: Mapping[str, set[int]] | None = None
) -> dict[str, ArmStatus]:
    """Look at the arms that share a baseline, round by round, and say which need more seeds.

    values: {arm: {seed: value}} of the runs that have ended; lost: the seeds of each that ended without a value. An arm
    that is decided stays so and is not looked at again; one whose seeds of a round have not all ended waits, and the
    others go on; the baseline has as many seeds as the arm that needs most. A function of the results alone: whoever is
    interrupted goes on where the results stand.
    """
    rounds, seeds = rule.rounds, rule.seeds
    if len(seeds) < rounds.most:
        raise ValueError(f"{rounds.most} seeds at most, and only {len(seeds)} are named")
    open_arms = [arm for arm in values if arm != baseline]
    found: dict[str, ArmStatus] = {arm: ArmStatus(0, None, False, rounds.sizes[0]) for arm in open_arms}
    ended = {arm: {*values[arm], *(lost or {}).get(arm, ())} for arm in values}
    for look, size in enumerate(rounds.sizes):
        now = set(seeds[:size])
        open_arms = [arm for arm in open_arms if now <= ended[arm] & ended[baseline]]
        judged = rule.judged(values, open_arms, baseline, look) if open_arms else {}
        following = next((more for more in rounds.sizes if more > size), size)
        for arm in open_arms:
            judgement, both = judged.get(arm), values[arm].keys() & values[baseline].keys()
            decided = judgement is not None and judgement.verdict not in OPEN
            differences = tuple(values[arm][s] - values[baseline][s] for s in seeds[:size] if s in both)
            more = size if decided else following
            found[arm] = ArmStatus(size, judgement, decided, more, look, differences if judgement else ())
        open_arms = [arm for arm in open_arms if not found[arm].decided]
    most = max((statuses.more for statuses in found.values()), default=rounds.sizes[0])
    found[baseline] = ArmStatus(max((s.seeds for s in found.values()), default=0), None, False, most)
    return found


def judged_where_they_stand(
    statuses: Mapping[str, ArmStatus], values: Mapping[str, Values], baseline: str, rule: LookRule
) -> dict[str, Judgement]:
    """Judgements of arms that have one baseline, on the metric of `rule`, each at the look where it stands.

    standing: by another metric, or by this one: then they are its judgements. values: {arm: {seed: value}}.
    """
    judged: dict[str, Judgement] = {}
    looked = [arm for arm in values if arm != baseline and statuses[arm].seeds]
    for look in sorted({statuses[arm].look for arm in looked}):
        arms = [arm for arm in looked if statuses[arm].look >= look]
        at_look = rule.judged(values, arms, baseline, look)
        judged |= {arm: own for arm, own in at_look.items() if statuses[arm].look == look}
    return judged


def round_levels(rounds: Rounds, comparisons: float = 1) -> tuple[Levels, ...]:
    """The levels of each look: of the two-sided test for a difference, of each one-sided one of equivalence.

    comparisons: arms that share the 5%.
    """
    two_sided = chain(rounds, LEVEL / comparisons).levels
    one_sided = chain(rounds, 2 * LEVEL / comparisons).levels
    return tuple(Levels(two, one / 2) for two, one in zip(two_sided, one_sided, strict=True))


def repeated_p(raw: float, look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """p-value of a difference at a look, adjusted for all looks and for the arms that share the 5%.

    It is the smallest level at which this look would decide (Jennison and Turnbull 2000, Group Sequential Methods,
    chapter 9): below 5% exactly where the look's level is passed, and valid whatever has stopped the looks.

    Args:
        raw: two-sided p-value of the look's own test.
        look: counted from zero.
    """
    import numpy as np

    wholes, levels = _levels_by_whole(rounds, comparisons)
    at_look = np.array([own[look] for own in levels])
    if not at_look.all() or raw >= at_look[-1]:
        return 1.0
    if raw <= at_look[0]:
        return float(min(1.0, comparisons * wholes[0] * raw / at_look[0]))
    return float(min(1.0, comparisons * np.exp(np.interp(math.log(raw), np.log(at_look), np.log(wholes)))))


@lru_cache(maxsize=64)
def _levels_by_whole(rounds: Rounds, comparisons: int) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """(levels of one arm for all looks together, for each the levels of every look); 5% and its shares among them."""
    wholes = sorted({1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 0.01, LEVEL / comparisons, LEVEL, 0.12, 0.3, 0.6, 1.0})
    return tuple(wholes), tuple(chain(rounds, whole).levels for whole in wholes)


def bias_adjusted(
    arm_statuses: Mapping[str, ArmStatus], rounds: Rounds, comparisons: int = 1, margin: float | None = None
) -> dict[str, float]:
    """Differences without the bias of the looks, of arms that were stopped by a later look than the first.

    In the unit of the metric that stopped them. The estimate is of looks at each arm's own t, so it is given only where
    these would have stopped the arm at the same look: with no margin, no documents in the interval, no lost run.
    """
    found = {}
    levels = [own.difference for own in round_levels(rounds, comparisons)]
    for arm, statuses in arm_statuses.items():
        d, judgement = statuses.differences, statuses.judgement
        stopped = statuses.decided and statuses.look and statuses.seeds < rounds.most
        if not stopped or judgement is None or margin is not None or judgement.difference.documents:
            continue
        if len(d) == statuses.seeds and statuses.look == _own_stop(d, rounds.sizes, levels):
            found[arm] = unbiased(d, statuses.look, rounds, comparisons)
    return found


def _own_stop(differences: Sequence[float], sizes: Sequence[int], levels: Sequence[float]) -> int | None:
    """First look at which the differences' own t passes the level; None where none does."""
    for look, (size, level) in enumerate(zip(sizes, levels, strict=True)):
        if size <= len(differences) and own_p(differences[:size]) < level:
            return look
    return None


def own_p(differences: Sequence[float]) -> float:
    """p-value of the two-sided t test that the mean is zero."""
    mean, seeds = statistics.fmean(differences), len(differences)
    spread = statistics.stdev(differences)
    return two_sided_p(mean / spread * math.sqrt(seeds), seeds - 1) if spread else float(not mean)


def unbiased(differences: Sequence[float], look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """Emerson's and Fleming's estimate of a mean that was last looked at with these differences, in their unit.

    Of differences whose own t has passed no level at an earlier look: of others the path has no chance.
    """
    root = math.sqrt(sum(d * d for d in differences))
    size = chain(rounds, LEVEL / comparisons).unbiased(look, own_p(differences), root)
    return math.copysign(size, statistics.fmean(differences))
