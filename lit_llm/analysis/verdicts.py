"""What the differences of a study say in words, and the smallest that its seeds could have shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from lit_llm.analysis.correction import (
    Correction,
    dunnett_critical,
    dunnett_p,
    fdr_bh,
    holm,
    two_sided_critical,
    two_sided_p,
)
from lit_llm.analysis.front import better
from lit_llm.analysis.paired import CONFIDENCE, Difference

DIFFERENT = ("better", "worse", "lower", "higher")
"""Verdicts that say that there is a difference, and of which kind."""
LEVEL = 1 - CONFIDENCE
"""Of every test here."""
POWER = 0.8

ADJUST: Mapping[Correction, Callable[[Mapping[str, float]], dict[str, float]]] = {
    "none": dict,
    "holm": holm,
    "fdr_bh": fdr_bh,
    "dunnett": holm,
}
"""How p-values are adjusted that have no procedure of their own."""


@dataclass(frozen=True)
class Levels:
    """Of the two-sided test for a difference, and of each of the two one-sided tests of equivalence."""

    difference: float = LEVEL
    within: float = LEVEL


@dataclass(frozen=True)
class Judgement:
    """What one arm's difference from its baseline says."""

    difference: Difference
    """With an interval that holds together with the others', where the correction has such intervals."""
    p: float | None
    """That there is no difference; two-sided, adjusted for the other comparisons. None for a single seed."""
    detectable: float | None
    """The smallest difference that so many seeds with this scatter show in four of five studies."""
    verdict: str
    """`better`, `worse`, `no difference larger than 0.02`, `not enough seeds`; without a margin `undecided` in place of
    the last two, and `higher` and `lower` of a metric that has no better."""


def judgements(
    differences: Mapping[str, Difference | None],
    baselines: Mapping[str, str],
    metric: str,
    correction: Correction = "none",
    margin: float | None = None,
    levels: Levels = Levels(),
) -> dict[str, Judgement]:
    """Judge every difference, those of all baselines as one family.

    margin: in the metric's unit; what is not larger is of no matter. That a difference is not is shown by two
    one-sided tests, at 5% each (Schuirmann 1987): the 90% interval lies within ± margin. levels: other than 5%, where
    it is looked at more than once; the intervals follow.
    """
    known = {arm: (d, d.error) for arm, d in differences.items() if d is not None and d.error is not None}
    families = _families({arm: d for arm, (d, _) in known.items()}, baselines, correction, levels)
    if correction == "dunnett":
        p = {arm: families[arm].p(_t(d.mean, error)) for arm, (d, error) in known.items()}
    else:
        p = ADJUST[correction]({arm: two_sided_p(_t(d.mean, error), d.degrees) for arm, (d, error) in known.items()})
    within = ADJUST[correction]({arm: _p_within(d, error, margin or 0.0) for arm, (d, error) in known.items()})
    found = {}
    for arm, d in differences.items():
        if d is None:
            continue
        if arm not in known:
            found[arm] = Judgement(d, None, None, "undecided" if margin is None else "not enough seeds")
            continue
        error = known[arm][1]
        if correction == "dunnett" or levels.difference != LEVEL:
            half = families[arm].value * error
            d = replace(d, low=d.mean - half, high=d.mean + half)
        least = error * detectable_ratio(families[arm].value, d.degrees)
        found[arm] = Judgement(d, p[arm], least, _verdict(d.mean, p[arm], within[arm], metric, margin, levels))
    return found


def stand_in(correction: Correction) -> Correction:
    """For effects and terms, which have no baseline in common: Dunnett's procedure is not defined, Holm's is."""
    return "holm" if correction == "dunnett" else correction


def judged_alone(
    differences: Mapping[str, Difference | None], metric: str, correction: Correction, margin: float | None
) -> dict[str, Judgement]:
    """Judge differences that have no baseline in common, all as one family; their intervals stand alone."""
    return judgements(differences, dict.fromkeys(differences, ""), metric, stand_in(correction), margin)


P_VALUES: Mapping[Correction, str] = {
    "none": "p: each alone; of {n} true zeros one in twenty is below 0.05",
    "holm": "p: Holm's, the chance that any of {n} true zeros is below 0.05 is 5%",
    "fdr_bh": "p: Benjamini-Hochberg's, one in twenty of the {n} that are below 0.05 is false",
    "dunnett": "p: Holm's, for Dunnett's is of arms; the chance that any of {n} true zeros is below 0.05 is 5%",
}
"""Said beside p-values that have no intervals of their own."""


def _verdict(mean: float, p: float, p_within: float, metric: str, margin: float | None, levels: Levels) -> str:
    if margin is not None and p_within < levels.within:  # first: it may be no zero and of no matter all the same
        return f"no difference larger than {margin:g}"
    if p >= levels.difference:
        return "undecided" if margin is None else "not enough seeds"
    direction = "lower" if mean < 0 else "higher"
    good = better(metric)
    return direction if good is None else "better" if direction == good else "worse"


def _p_within(d: Difference, error: float, margin: float) -> float:
    """That the difference is as large as the margin: of the two one-sided tests the one of the nearer end."""
    room = margin - abs(d.mean)
    return two_sided_p(_t(room, error), d.degrees) / 2 if room > 0 else 1.0


def _t(mean: float, error: float) -> float:
    """Of an arm that is the baseline to the last bit, zero."""
    return mean / error if error else float("inf") if mean else 0.0


@dataclass(frozen=True)
class _Family:
    """An arm's place among those that are compared with the same baseline, by Dunnett's procedure."""

    arms: int
    baselines: int
    degrees: int
    pooled: bool
    level: float

    @property
    def value(self) -> float:
        """The critical |t|; of several baselines each has an equal share of the level."""
        level = self.level / self.baselines
        if self.pooled:
            return dunnett_critical(level, self.arms, self.degrees)
        return two_sided_critical(level / self.arms, self.degrees)

    def p(self, t: float) -> float:
        alone = dunnett_p(t, self.arms, self.degrees) if self.pooled else self.arms * two_sided_p(t, self.degrees)
        return min(1.0, self.baselines * alone)


def _families(
    differences: Mapping[str, Difference], baselines: Mapping[str, str], correction: Correction, levels: Levels
) -> dict[str, _Family]:
    """Where the correction has no intervals of its own, each difference is a family of one."""
    blocks: dict[str, list[str]] = {}
    for arm in differences:
        blocks.setdefault(baselines[arm], []).append(arm)
    found = {}
    for arms in blocks.values():
        # Arms that share their runs are one.
        count = len({(differences[arm].mean, differences[arm].error) for arm in arms})
        for arm in arms:
            size = (count, len(blocks)) if correction == "dunnett" else (1, 1)
            found[arm] = _Family(*size, differences[arm].degrees, differences[arm].pooled, levels.difference)
    return found


@lru_cache
def detectable_ratio(critical: float, degrees: int, power: float = POWER) -> float:
    """The difference, in standard errors, with which |t| exceeds its critical value with this probability.

    By the noncentral t distribution. The standard error is itself an estimate: of three seeds it is a rough guide.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    def lacking(ratio: float) -> float:
        # The other tail, where the difference is found with the wrong sign, adds nothing at this power.
        return float(nct.sf(critical, degrees, ratio)) - power

    return float(brentq(lacking, 0.0, 4 * critical + 4))
