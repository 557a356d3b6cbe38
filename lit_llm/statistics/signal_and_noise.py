"""Signal and noise of a metric at one size, and how well a small size decides for the largest one.

After Signal and Noise (Heineman et al. 2025, arXiv 2508.13144) and DataDecide (Magnusson et al. 2025, arXiv
2504.11393). y[arm, seed] are the runs of one size; ms, mr are the mean squares of seeds and of arms x seeds:

    signal             (largest - smallest mean of an arm) / mean of all
    noise              sqrt((ms + (K - 1) mr) / K) / mean of all     one run about its arm's mean, K arms
    paired noise       sqrt(mr) / mean of all                        the same without what a seed does to all arms
    ratio              signal / paired noise
    decision accuracy  share of the pairs of arms that the small size orders as the largest size does

`docs/statistics.md` says how this differs from the papers, how the intervals are computed, and how often they hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_llm.statistics.estimates import Estimate
from lit_llm.statistics.paired import CONFIDENCE, Values

FEWEST_ARMS = 3
"""Arms below which a spread over arms, or a share of their pairs, says nothing."""
FEWEST_SEEDS = 2
LAST_VALIDATIONS = 5
"""Most validations at the end of a run that count as its last ones."""
LAST_SHARE = 0.25
"""Share of the steps of a run, its last ones, that the last validations lie in."""
MOST_TUKEY_ARMS = 100
"""Arms above which the studentised range is not computed: it takes too long, and its interval is too wide for use."""


@dataclass(frozen=True)
class SignalAndNoise:
    """One metric over the arms and seeds of one size. All but counts and the mean are relative to the mean."""

    arms: int
    """Arms with different runs and a value for each of the seeds."""
    seeds: int
    """Seeds that all these arms have."""
    mean: float
    signal: Estimate | None
    """None for fewer than three arms, and for a mean that is not positive."""
    noise: Estimate | None
    """None for fewer than two seeds, and for a mean that is not positive."""
    paired_noise: Estimate | None
    """None for fewer than two arms too."""
    ratio: float | None
    """None without signal or paired noise, or where the paired noise is zero."""

    @property
    def differs(self) -> bool | None:
        """True where any two arms are shown to differ; None where the signal has no interval."""
        low = self.signal.low if self.signal else None
        return None if low is None else low > 0


def signal_and_noise(values: Mapping[str, Values]) -> SignalAndNoise | None:
    """Signal and noise of one metric at one size; None without any value.

    values: {arm: {seed: value}}. Where an arm has two seeds or more, arms with one are left out, and the seeds are
    those that the others share. Arms that share all their runs count once.
    """
    import numpy as np

    measured = [arm for arm in values.values() if arm]
    repeated = [arm for arm in measured if len(arm) >= FEWEST_SEEDS]
    shared = set.intersection(*map(set, repeated)) if repeated else set()
    if len(shared) < FEWEST_SEEDS:
        return _without_seeds(measured)
    seeds = sorted(shared)
    rows = dict.fromkeys(tuple(arm[seed] for seed in seeds) for arm in repeated)
    table = np.array(list(rows), dtype=np.float64)
    arms, count = table.shape
    mean = float(table.mean())
    if mean <= 0:
        return SignalAndNoise(arms, count, mean, None, None, None, None)
    by_arm, by_seed = table.mean(axis=1), table.mean(axis=0)
    residual = table - by_arm[:, None] - by_seed[None, :] + mean
    of_seeds = arms * float(by_seed.var(ddof=1))
    degrees = (arms - 1) * (count - 1)
    squared = float((residual**2).sum()) / degrees if degrees else 0.0
    noise = _deviation([(of_seeds / arms, count - 1), ((arms - 1) / arms * squared, degrees)], mean)
    paired = _deviation([(squared, degrees)], mean) if degrees else None
    signal = None
    if arms >= FEWEST_ARMS:
        spread = float(np.ptp(by_arm))
        half = math.sqrt(squared / count) * _studentised_range(arms, degrees) if arms <= MOST_TUKEY_ARMS else None
        signal = _spread(spread, half, mean)
    ratio = signal.value / paired.value if signal and paired and paired.value else None
    return SignalAndNoise(arms, count, mean, signal, noise, paired, ratio)


def _without_seeds(measured: Sequence[Values]) -> SignalAndNoise | None:
    """The mean and the spread of arms that share one seed, or none."""
    import numpy as np

    if not measured:
        return None
    means = [math.fsum(arm.values()) / len(arm) for arm in measured]
    mean, shared = float(np.mean(means)), set.intersection(*map(set, measured))
    signal = _spread(float(np.ptp(means)), None, mean) if len(set(means)) >= FEWEST_ARMS and mean > 0 else None
    return SignalAndNoise(len(set(means)), len(shared), mean, signal, None, None, None)


def _spread(spread: float, half: float | None, mean: float) -> Estimate:
    """The dispersion with its interval: all differences of two arms lie within `half` of theirs at once."""
    if half is None:
        return Estimate(spread / mean)
    return Estimate(spread / mean, max(0.0, spread - half) / mean, (spread + half) / mean)


def _deviation(parts: Sequence[tuple[float, int]], mean: float) -> Estimate:
    """Root of a sum of independent mean squares over the mean, with the interval of Graybill and Wang.

    The interval is that of a variance by chi-square for one mean square (1980, J. Am. Stat. Assoc. 75). Satterthwaite's
    covers 78% where two seeds move eight arms alike.

    parts: (mean square with its weight, degrees of freedom).
    """
    from scipy.special import chdtri

    squared, tail = math.fsum(part for part, _ in parts), (1 - CONFIDENCE) / 2
    known = [(part, df) for part, df in parts if df]
    below = math.fsum((part * (1 - df / float(chdtri(df, tail)))) ** 2 for part, df in known)
    above = math.fsum((part * (df / float(chdtri(df, 1 - tail)) - 1)) ** 2 for part, df in known)
    ends = (squared, max(0.0, squared - math.sqrt(below)), squared + math.sqrt(above))
    return Estimate(*(math.sqrt(each) / mean for each in ends))


@lru_cache
def _studentised_range(arms: int, degrees: int) -> float:
    """The range of `arms` equal means over their standard error that 5% exceed (Tukey)."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, arms, degrees))


# --- the last validations of a run ----------------------------------------------------------------------------------


def last_validations(course: Sequence[tuple[int, float]], end_alike: bool = True) -> list[tuple[int, float]]:
    """The last validations of a run's course of (step, value): at most five, all in the last quarter of its steps.

    end_alike: the validation after the last step reads what the others read; else it is left out.
    """
    if not course:
        return []
    begin = course[-1][0] * (1 - LAST_SHARE)
    alike = course if end_alike else course[:-1]
    return [each for each in alike if each[0] >= begin][-LAST_VALIDATIONS:]


def checkpoint_noise(courses: Sequence[Sequence[tuple[int, float]]]) -> float | None:
    """Relative standard deviation of the last validations about a straight line over the steps, pooled over runs.

    A loss still falls while the learning rate decays, and this fall is no noise. None where no run has three
    validations at its end, or the mean is not positive.
    """
    import numpy as np

    squares, degrees, seen = 0.0, 0, list[float]()
    for course in courses:
        if len(course) < 3:
            continue
        steps, values = np.array(course, dtype=np.float64).T
        centred = steps - steps.mean()
        slope = float(centred @ values) / float(centred @ centred)
        squares += float(((values - values.mean() - slope * centred) ** 2).sum())
        degrees += len(course) - 2
        seen.extend(values)
    mean = float(np.mean(seen)) if seen else 0.0
    return math.sqrt(squares / degrees) / mean if degrees and mean > 0 else None


# --- decision accuracy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecisionAccuracy:
    """Share of the pairs of arms that a small size orders as the largest size does."""

    arms: int
    pairs: int
    share: Estimate
    """Its interval is for other arms of the same kind."""


def decision_accuracy(small: Mapping[str, float], large: Mapping[str, float]) -> DecisionAccuracy | None:
    """Decision accuracy over the arms that both sizes have; None for fewer than three.

    small, large: {arm: mean over seeds}. A pair that is equal at one size is ordered by chance, and counts half.
    """
    import numpy as np

    shared = [arm for arm in small if arm in large]
    arms = len(shared)
    if arms < FEWEST_ARMS:
        return None
    orders = [np.sign(np.subtract.outer(x, x)) for x in ([each[arm] for arm in shared] for each in (small, large))]
    agrees = (1 + orders[0] * orders[1]) / 2
    np.fill_diagonal(agrees, 0)
    by_arm = agrees.sum(axis=1) / (arms - 1)
    return DecisionAccuracy(arms, arms * (arms - 1) // 2, _share_of_pairs(by_arm))


def _share_of_pairs(by_arm: Any) -> Estimate:
    """A share of all pairs with the interval of Clopper and Pearson for as many independent pairs as it is worth.

    Pairs have arms in common. Where both orders are independent, the share has the variance (2K + 5) / (18 K (K - 1))
    (Kendall 1938, Biometrika 30), that of 9 K (K - 1) / (2 (2K + 5)) independent pairs. Where some arms change their
    places by much, the share is worth less: its jackknife variance then decides, down to K / 2 pairs without a common
    arm.

    by_arm: share of the pairs of each arm.
    """
    from scipy.special import betaincinv

    arms, share = len(by_arm), float(by_arm.mean())
    worth = 9 * arms * (arms - 1) / (2 * (2 * arms + 5))
    variance = 4 * (arms - 1) / (arms * (arms - 2) ** 2) * float(((by_arm - share) ** 2).sum())
    if variance:
        worth = min(worth, max(arms / 2, share * (1 - share) / variance))
    right, tail = share * worth, (1 - CONFIDENCE) / 2
    low = float(betaincinv(right, worth - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, worth - right, 1 - tail)) if right < worth else 1.0
    return Estimate(share, low, high)
