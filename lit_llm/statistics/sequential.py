"""Group sequential tests: seeds are added in rounds, only for arms whose difference is not decided yet.

A test at 5% after every round calls far more than one in twenty true zeros different. Here the 5% are spent over the
interim analyses (`lit_llm.statistics.alpha_spending`). Where several arms share one family-wise level, each arm has an
equal share of the 5% (Bonferroni), which is valid whatever the arms have in common.

A metric on the validation split decides which arms get more seeds. The table shows the metric on the test split, at the
analysis where the first has stopped each arm. The level of an analysis and its p-value (`repeated_p`) hold for any
stopping rule.

A difference that stopped the rounds early is too large on average. The bias-adjusted estimate is unbiased over all ways
in which the analyses can end (Emerson and Fleming 1990, Biometrika 77).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from lit_llm.statistics.alpha_spending import PastInterims, Rounds, chain, pocock_spending
from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.multiple_comparisons import two_sided_p
from lit_llm.statistics.paired import Values
from lit_llm.statistics.verdicts import LEVEL, Judgement, Levels, judgements

__all__ = [
    "ArmStatus",
    "InterimRule",
    "PastInterims",
    "Rounds",
    "arm_statuses",
    "judgements_at_interims",
    "pocock_spending",
]

OPEN = ("undecided", "not enough seeds")
"""Verdicts that leave an arm undecided: without a margin, and with one."""


@dataclass(frozen=True)
class ArmStatus:
    """Status of an arm after its last interim analysis."""

    seeds: int
    """Number of seeds, the first of the list, in the last analysis or in the one that decided."""
    judgement: Judgement | None
    """Judgement at the level of that analysis, with p adjusted for all analyses; None before the first analysis."""
    decided: bool
    more: int
    """Number of seeds to run the arm with next, from the first of the list; `seeds` where the arm is done."""
    interim_index: int = 0
    """Number of that analysis, counted from zero."""
    differences: tuple[float, ...] = ()
    """Differences from the baseline, seed by seed, at that analysis."""


@dataclass(frozen=True)
class InterimRule:
    """Rule by which arms are judged at each interim analysis."""

    metric: str
    seeds: Sequence[int]
    """Seeds in the order in which they are added, `rounds.most` or more."""
    rounds: Rounds
    margin: float | None = None
    comparisons: int = 1
    """Arms that share the 5%, those of other baselines included."""
    noise: Noise = field(default_factory=Noise)

    def judged(
        self, values: Mapping[str, Values], arms: Sequence[str], baseline: str, interim: int
    ) -> dict[str, Judgement]:
        """Judgements of arms that have one baseline, with the seeds and the level of an interim analysis."""
        levels = round_levels(self.rounds, self.comparisons)
        # Where nothing of the 5% is left, no arm is decided, and the interval is at the last level above zero.
        usable = next((each for each in reversed(levels[: interim + 1]) if each.difference), Levels())
        now = self.seeds[: self.rounds.sizes[interim]]
        block = {arm: {s: values[arm][s] for s in now if s in values[arm]} for arm in (*arms, baseline)}
        differences = block_differences(block, baseline, self.noise)
        judged = judgements(differences, dict.fromkeys(block, baseline), self.metric, margin=self.margin, levels=usable)
        if not levels[interim].difference:
            undecided = OPEN[0] if self.margin is None else OPEN[1]
            judged = {arm: replace(each, verdict=undecided) for arm, each in judged.items()}
        return {
            arm: each if each.p is None else replace(each, p=repeated_p(each.p, interim, self.rounds, self.comparisons))
            for arm, each in judged.items()
        }


def arm_statuses(
    values: Mapping[str, Values], baseline: str, rule: InterimRule, lost: Mapping[str, set[int]] | None = None
) -> dict[str, ArmStatus]:
    """Status of the arms that share a baseline, by their interim analyses: which need more seeds.

    A decided arm stays decided and is not tested again. An arm waits until all its seeds of a round have ended, while
    the others go on. The baseline has as many seeds as the arm that needs most. The statuses depend on the results
    alone, so an interrupted study continues where it was.

    values: {arm: {seed: value}} of the runs that have ended; lost: {arm: seeds that ended without a value}.
    """
    rounds, seeds = rule.rounds, rule.seeds
    if len(seeds) < rounds.most:
        raise ValueError(f"{rounds.most} seeds at most, and only {len(seeds)} are named")
    open_arms = [arm for arm in values if arm != baseline]
    statuses: dict[str, ArmStatus] = {arm: ArmStatus(0, None, False, rounds.sizes[0]) for arm in open_arms}
    ended = {arm: {*values[arm], *(lost or {}).get(arm, ())} for arm in values}
    for interim, size in enumerate(rounds.sizes):
        now = set(seeds[:size])
        open_arms = [arm for arm in open_arms if now <= ended[arm] & ended[baseline]]
        judged = rule.judged(values, open_arms, baseline, interim) if open_arms else {}
        following = next((more for more in rounds.sizes if more > size), size)
        for arm in open_arms:
            judgement, both = judged.get(arm), values[arm].keys() & values[baseline].keys()
            decided = judgement is not None and judgement.verdict not in OPEN
            differences = tuple(values[arm][s] - values[baseline][s] for s in seeds[:size] if s in both)
            more = size if decided else following
            statuses[arm] = ArmStatus(size, judgement, decided, more, interim, differences if judgement else ())
        open_arms = [arm for arm in open_arms if not statuses[arm].decided]
    most = max((status.more for status in statuses.values()), default=rounds.sizes[0])
    statuses[baseline] = ArmStatus(max((s.seeds for s in statuses.values()), default=0), None, False, most)
    return statuses


def judgements_at_interims(
    statuses: Mapping[str, ArmStatus], values: Mapping[str, Values], baseline: str, rule: InterimRule
) -> dict[str, Judgement]:
    """Judgements of arms that have one baseline, on the metric of `rule`, each at the analysis of its status.

    statuses: by this metric or by another one; values: {arm: {seed: value}}.
    """
    judged: dict[str, Judgement] = {}
    tested = [arm for arm in values if arm != baseline and statuses[arm].seeds]
    for interim in sorted({statuses[arm].interim_index for arm in tested}):
        arms = [arm for arm in tested if statuses[arm].interim_index >= interim]
        at_interim = rule.judged(values, arms, baseline, interim)
        judged |= {arm: each for arm, each in at_interim.items() if statuses[arm].interim_index == interim}
    return judged


def round_levels(rounds: Rounds, comparisons: float = 1) -> tuple[Levels, ...]:
    """Levels of each interim analysis: two-sided for a difference, one-sided for equivalence.

    comparisons: number of arms that share the 5%.
    """
    two_sided = chain(rounds, LEVEL / comparisons).levels
    one_sided = chain(rounds, 2 * LEVEL / comparisons).levels
    return tuple(Levels(two, one / 2) for two, one in zip(two_sided, one_sided, strict=True))


def repeated_p(raw: float, interim: int, rounds: Rounds, comparisons: int = 1) -> float:
    """p-value of a difference at an interim analysis, adjusted for all analyses and for the arms that share the 5%.

    It is the smallest level at which this analysis would decide (Jennison and Turnbull 2000, Group Sequential Methods,
    chapter 9): below 5% exactly where the level of the analysis is passed, and valid for any stopping rule.

    Args:
        raw: two-sided p-value of the single test at this analysis.
        interim: number of the analysis, counted from zero.
    """
    import numpy as np

    overall, levels = _levels_by_overall(rounds, comparisons)
    single = np.array([each[interim] for each in levels])
    if not single.all() or raw >= single[-1]:
        return 1.0
    if raw <= single[0]:
        return float(min(1.0, comparisons * overall[0] * raw / single[0]))
    return float(min(1.0, comparisons * np.exp(np.interp(math.log(raw), np.log(single), np.log(overall)))))


@lru_cache(maxsize=64)
def _levels_by_overall(rounds: Rounds, comparisons: int) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """(overall levels of one arm, for each the levels of every interim analysis); 5% and its shares among them."""
    overall = sorted({1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 0.01, LEVEL / comparisons, LEVEL, 0.12, 0.3, 0.6, 1.0})
    return tuple(overall), tuple(chain(rounds, level).levels for level in overall)


def bias_adjusted(
    statuses: Mapping[str, ArmStatus], rounds: Rounds, comparisons: int = 1, margin: float | None = None
) -> dict[str, float]:
    """Differences without the bias of stopping, of arms stopped early by a later interim analysis than the first.

    In the unit of the metric that stopped them. The estimate assumes that each arm is tested by its own paired t-test.
    So it is given only where that test would have stopped the arm at the same analysis: with no margin, no documents in
    the interval, no lost run.
    """
    estimates = {}
    levels = [each.difference for each in round_levels(rounds, comparisons)]
    for arm, status in statuses.items():
        d, judgement = status.differences, status.judgement
        stopped = status.decided and status.interim_index and status.seeds < rounds.most
        if not stopped or judgement is None or margin is not None or judgement.difference.documents:
            continue
        if len(d) == status.seeds and status.interim_index == _first_rejection(d, rounds.sizes, levels):
            estimates[arm] = unbiased(d, status.interim_index, rounds, comparisons)
    return estimates


def _first_rejection(differences: Sequence[float], sizes: Sequence[int], levels: Sequence[float]) -> int | None:
    """First interim analysis at which the paired t-test passes the level; None where none does."""
    for interim, (size, level) in enumerate(zip(sizes, levels, strict=True)):
        if size <= len(differences) and t_test_p(differences[:size]) < level:
            return interim
    return None


def t_test_p(differences: Sequence[float]) -> float:
    """p-value of the two-sided t test that the mean is zero."""
    mean, seeds = statistics.fmean(differences), len(differences)
    spread = statistics.stdev(differences)
    return two_sided_p(mean / spread * math.sqrt(seeds), seeds - 1) if spread else float(not mean)


def unbiased(differences: Sequence[float], interim: int, rounds: Rounds, comparisons: int = 1) -> float:
    """Emerson's and Fleming's estimate of the mean of the differences at their last interim analysis, in their unit.

    The paired t-test of the differences must have passed no level at an earlier analysis.
    """
    root = math.sqrt(sum(d * d for d in differences))
    size = chain(rounds, LEVEL / comparisons).unbiased(interim, t_test_p(differences), root)
    return math.copysign(size, statistics.fmean(differences))
