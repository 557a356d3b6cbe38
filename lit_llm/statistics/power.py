"""Power of a paired comparison: seeds needed for a difference, and difference detected with given seeds.

The test is the one-sample t-test of the differences over shared seeds, two-sided, with n - 1 degrees of freedom. Its
power follows from the noncentral t distribution (Cohen 1988, Statistical Power Analysis, chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lit_llm.statistics.multiple_comparisons import two_sided_critical

POWER = 0.8
"""Share of studies in which a true difference of the given size is detected."""
MOST_SEEDS = 10_000
"""Largest number of seeds that is searched."""
CONFIDENCE = 0.8
"""Confidence of the upper limit of a standard deviation in a cautious plan (Browne 1995, Stat. Med. 14)."""


@dataclass(frozen=True)
class Scatter:
    """Standard deviation of paired differences, with its degrees of freedom."""

    sd: float
    degrees: int
    """Degrees of freedom of the estimate: seeds minus one, summed over the arms that it is pooled over."""

    @property
    def upper(self) -> float:
        """Upper 80% confidence limit of the standard deviation, for normal differences."""
        from scipy.special import chdtri

        return self.sd * math.sqrt(self.degrees / float(chdtri(self.degrees, CONFIDENCE)))


def power(difference: float, sd: float, seeds: int, level: float = 0.05) -> float:
    """Probability that a paired t-test detects a true difference.

    Args:
        difference: true mean of the paired differences, in the metric's unit.
        sd: standard deviation of the paired differences, in the same unit.
        seeds: number of seeds that both arms share, at least 2.
        level: level of the two-sided test.

    Returns:
        The probability, by the noncentral t distribution, rejections in the wrong direction included.

    Raises:
        ValueError: fewer than two seeds.
    """
    import numpy as np
    from scipy.stats import nct

    if seeds < 2:
        raise ValueError(f"a paired t-test needs two seeds or more, and there are {seeds}")
    if sd == 0:
        return 1.0 if difference else 0.0
    shift, degrees = abs(difference) / sd * math.sqrt(seeds), seeds - 1
    critical = two_sided_critical(level, degrees)
    # scipy returns nan for some vanishing probabilities in the wrong direction.
    wrong = np.nan_to_num(nct.cdf(-critical, degrees, shift))
    return float(nct.sf(critical, degrees, shift) + wrong)


def seeds_for(difference: float, sd: float, target: float = POWER, level: float = 0.05) -> int | None:
    """Smallest number of seeds with which a paired t-test detects a difference with the target power.

    Args:
        difference: true mean of the paired differences, in the metric's unit.
        sd: standard deviation of the paired differences, in the same unit.
        target: probability of detection.
        level: level of the two-sided test.

    Returns:
        The number, at least 2; None where `MOST_SEEDS` are too few.
    """
    low, high = 1, 2
    while power(difference, sd, high, level) < target:
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:  # `low` seeds are too few, `high` are enough
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, sd, middle, level) >= target else (middle, high)
    return high


def minimum_detectable_difference(sd: float, seeds: int, target: float = POWER, level: float = 0.05) -> float:
    """Smallest true difference that a paired t-test detects with the target power.

    Args:
        sd: standard deviation of the paired differences, in the metric's unit.
        seeds: number of seeds that both arms share, at least 2.
        target: probability of detection.
        level: level of the two-sided test.

    Returns:
        The difference, in the metric's unit, by the noncentral t distribution.

    Raises:
        ValueError: fewer than two seeds.
    """
    from scipy.optimize import brentq

    if power(0.0, 1.0, seeds, level) >= target:
        return 0.0
    high = 1.0
    while power(high, 1.0, seeds, level) < target:
        high *= 2
    return sd * float(brentq(lambda ratio: power(ratio, 1.0, seeds, level) - target, 0.0, high, xtol=1e-10))


def scatter_of(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Scatter | None:
    """Scatter of an arm's differences from its baseline, {seed: value} each; None below two shared seeds.

    None too for an arm that equals its baseline in every seed: its scatter says nothing about another arm.
    """
    import statistics

    differences = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if len(differences) < 2:
        return None
    sd = statistics.stdev(differences)
    return Scatter(sd, len(differences) - 1) if sd > 0 else None


def pooled(scatters: Iterable[Scatter]) -> Scatter | None:
    """Root of the mean variance, weighted by degrees of freedom; None without any."""
    every = list(scatters)
    degrees = sum(scatter.degrees for scatter in every)
    if not degrees:
        return None
    return Scatter(math.sqrt(sum(s.degrees * s.sd**2 for s in every) / degrees), degrees)
