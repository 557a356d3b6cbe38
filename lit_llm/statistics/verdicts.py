"""Verdicts on the differences of a study, and the smallest differences that its seeds detect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from lit_llm.config.metrics import direction
from lit_llm.statistics.multiple_comparisons import (
    Correction,
    dunnett_critical,
    dunnett_p,
    fdr_bh,
    holm,
    two_sided_critical,
)
from lit_llm.statistics.paired import CONFIDENCE, Difference, Spread
from lit_llm.statistics.power import POWER

DIFFERENT = ("better", "worse", "lower", "higher")
"""Verdicts of a significant difference."""
LOST: Final = "undecided: lost runs"
"""Verdict on a difference that favours the side with diverged runs."""
UNDECIDED = ("undecided", "not enough seeds", LOST)
"""Verdicts without a conclusion."""
LEVEL = 1 - CONFIDENCE
"""Level of every test here."""

ADJUST: Mapping[Correction, Callable[[Mapping[str, float]], dict[str, float]]] = {
    "none": dict,
    "holm": holm,
    "fdr_bh": fdr_bh,
    "dunnett": holm,
}
"""Adjustment of p-values for each correction; Dunnett's falls back to Holm's."""


@dataclass(frozen=True)
class Levels:
    """Level of the two-sided test for a difference, and of each of the two one-sided tests of equivalence."""

    difference: float = LEVEL
    within: float = LEVEL


@dataclass(frozen=True)
class Judgement:
    """Test of one arm's difference from its baseline."""

    difference: Difference
    """Difference with a simultaneous interval, where a correction is asked for."""
    p: float | None
    """p-value of the two-sided test of no difference, adjusted for the other comparisons; None for a single seed."""
    detectable: float | None
    """Smallest true difference that this number of seeds detects with 80% power."""
    verdict: str
    """`better`, `worse`, `no difference larger than 0.02`, `not enough seeds`; without a margin `undecided` in place of
    the last two; `higher` and `lower` for a metric without a direction."""


def judgements(
    differences: Mapping[str, Difference | None],
    baselines: Mapping[str, str],
    metric: str,
    correction: Correction = "none",
    margin: float | None = None,
    levels: Levels = Levels(),
) -> dict[str, Judgement]:
    """Judge every difference, those of all baselines as one family.

    margin: largest difference that does not matter, in the metric's unit. Equivalence is tested by two one-sided tests
    at 5% each (Schuirmann 1987): the 90% interval lies within ± margin. levels: of the tests and intervals, other than
    5% in an interim analysis.
    """
    estimated = {arm: d for arm, d in differences.items() if d is not None and d.error is not None}
    procedures = _procedures(estimated, baselines, correction, levels.difference)
    alone = {arm: procedures[arm].p(d) for arm, d in estimated.items()}
    p = alone if correction == "dunnett" else _adjusted(alone, estimated, correction)
    within = _adjusted({arm: _p_within(d, margin or 0.0) for arm, d in estimated.items()}, estimated, correction)
    judged = {}
    for arm, d in differences.items():
        if d is None:
            continue
        if arm not in estimated:
            judged[arm] = Judgement(d, None, None, "undecided" if margin is None else "not enough seeds")
            continue
        procedure = procedures[arm]
        verdict = _verdict(d.mean, p[arm], within[arm], metric, margin, levels)
        judged[arm] = Judgement(procedure.widened(d), p[arm], procedure.detectable(d), verdict)
    return judged


def _adjusted(
    p: Mapping[str, float], differences: Mapping[str, Difference], correction: Correction
) -> dict[str, float]:
    """Adjusted p-values; arms that share their runs count as one test."""
    first: dict[tuple[float, float | None], str] = {}
    for arm, d in differences.items():
        first.setdefault((d.mean, d.error), arm)
    adjusted = ADJUST[correction]({arm: p[arm] for arm in first.values()})
    return {arm: adjusted[first[d.mean, d.error]] for arm, d in differences.items()}


def without_lost_runs(judgement: Judgement, metric: str, arm_lost: bool, baseline_lost: bool) -> Judgement:
    """The same judgement, but undecided where it favours a side with diverged runs.

    Diverged runs are in no mean, so an arm that lost its worst runs looks better than it is.
    """
    good = direction(metric)
    if judgement.verdict in UNDECIDED or not (arm_lost or baseline_lost):
        return judgement
    if judgement.verdict not in DIFFERENT:  # the remaining runs may be equivalent where the arms are not
        return replace(judgement, verdict=LOST)
    lower = judgement.difference.mean < 0
    favours_arm = lower == (good == "lower") if good else None
    biased = favours_arm is None or (arm_lost if favours_arm else baseline_lost)
    return replace(judgement, verdict=LOST) if biased else judgement


def stand_in(correction: Correction) -> Correction:
    """Correction of effects and terms, which have no common baseline: Holm's in place of Dunnett's."""
    return "holm" if correction == "dunnett" else correction


def judged_alone(
    differences: Mapping[str, Difference | None], metric: str, correction: Correction, margin: float | None
) -> dict[str, Judgement]:
    """Judge differences that have no baseline in common, all as one family."""
    return judgements(differences, dict.fromkeys(differences, ""), metric, stand_in(correction), margin)


P_VALUES: Mapping[Correction, str] = {
    "none": "p-values are not adjusted for {n} comparisons: without a true difference, p is still below "
    "0.05 in 1 test of 20",
    "holm": "p-values are adjusted for {n} comparisons by Holm's method: the chance of any below 0.05 without a true "
    "difference is at most 5%",
    "fdr_bh": "p-values are adjusted for {n} comparisons by Benjamini and Hochberg's method: of those below 0.05 at "
    "most 1 in 20 is expected to be false",
    "dunnett": "p-values are adjusted for {n} comparisons by Holm's method, since Dunnett's is for arms: the chance of "
    "any below 0.05 without a true difference is at most 5%",
}
"""Notes beside p-values that have no intervals of their own."""


def _verdict(mean: float, p: float, p_within: float, metric: str, margin: float | None, levels: Levels) -> str:
    if (
        margin is not None and p_within < levels.within
    ):  # first: a significant difference may still be within the margin
        return f"no difference larger than {margin:g}"
    if p >= levels.difference:
        return "undecided" if margin is None else "not enough seeds"
    sign, good = "lower" if mean < 0 else "higher", direction(metric)
    return sign if good is None else "better" if sign == good else "worse"


def _p_within(d: Difference, margin: float) -> float:
    """p-value of the equivalence test: the one-sided test against the nearer end of ± margin."""
    distance = margin - abs(d.mean)
    return max(spread.p(distance) for spread in d.spreads) / 2 if distance > 0 else 1.0


@dataclass(frozen=True)
class _Procedure:
    """Test and interval of one arm: Student's t at a share of the level, or Dunnett's."""

    level: float
    """Level of the interval, two-sided."""
    arms: int = 0
    """Number of arms compared with one baseline, for Dunnett's; 0 for Student's t."""
    baselines: int = 1
    """Number of baselines that share the level."""

    def critical(self, degrees: float) -> float:
        if self.arms:
            return dunnett_critical(self.level / self.baselines, self.arms, degrees)
        return two_sided_critical(self.level, degrees)

    def widened(self, d: Difference) -> Difference:
        """The difference with the interval of this procedure."""
        if self.level == LEVEL and not self.arms:
            return d
        half, seeds = (max(map(self._half, spreads)) for spreads in (d.spreads, d.spreads[:1]))
        d = replace(d, low=d.mean - half, high=d.mean + half)
        return replace(d, seeds_low=d.mean - seeds, seeds_high=d.mean + seeds)

    def _half(self, spread: Spread) -> float:
        return self.critical(spread.degrees) * spread.error

    def p(self, d: Difference) -> float:
        return d.p() if not self.arms else max(self._dunnett(d.mean, spread) for spread in d.spreads)

    def _dunnett(self, mean: float, spread: Spread) -> float:
        t = abs(mean / spread.error) if spread.error else float("inf") if mean else 0.0
        return min(1.0, self.baselines * dunnett_p(t, self.arms, spread.degrees))

    def detectable(self, d: Difference) -> float:
        return max(
            spread.error * detectable_ratio(self.critical(spread.degrees), spread.degrees) for spread in d.spreads
        )


def _procedures(
    differences: Mapping[str, Difference], baselines: Mapping[str, str], correction: Correction, level: float
) -> dict[str, _Procedure]:
    """Procedure of each arm such that the intervals of a correction are simultaneous (Bonferroni's or Dunnett's)."""
    # Arms that share their runs count once.
    distinct = {arm: (d.mean, d.error) for arm, d in differences.items()}
    if correction != "dunnett":
        share = 1 if correction == "none" else len(set(distinct.values()))
        return dict.fromkeys(differences, _Procedure(level / max(1, share)))
    blocks: dict[str, list[str]] = {}
    for arm in differences:
        blocks.setdefault(baselines[arm], []).append(arm)
    return {
        arm: _Procedure(level, len({distinct[other] for other in arms}), len(blocks))
        for arms in blocks.values()
        for arm in arms
    }


LARGE = 300.0
"""Critical value from which the noncentral t is approximated by its numerator's mean over the estimated error: the
ratio is right to a part in 100,000. There scipy's inverse loses digits and, from a million on, does not end."""


def detectable_ratio(critical: float, degrees: float, power: float = POWER) -> float:
    """Difference, in standard errors, at which |t| exceeds its critical value with probability `power`.

    By the noncentral t distribution. The standard error is itself an estimate: with three seeds this is a rough guide.
    """
    from scipy.special import chdtri, nctdtrinc  # a root of scipy.stats.nct takes sixty times as long

    if critical > LARGE:
        return critical * math.sqrt(float(chdtri(degrees, 1 - power)) / degrees)
    # Rejections in the wrong direction add nothing at this power.
    return float(nctdtrinc(degrees, 1 - power, critical))
