"""Paired differences over seeds, with their 95% intervals.

Two arms with one seed share data, order and the initial value of every parameter they have in common, so the seed's own
luck cancels in their difference. Few seeds leave few degrees of freedom; where the arms of a block scatter alike, their
residual variance is pooled (the additive model arm + seed, as in a randomised block design), which gives more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lit_llm.analysis.correction import two_sided_critical

Values = Mapping[int, float]
"""{seed: value} of one arm."""

CONFIDENCE = 0.95
UNEQUAL = 0.05
"""Bartlett's p below which the arms are taken to scatter differently, and nothing is pooled."""


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus its baseline's, over the seeds that both have."""

    mean: float
    seeds: int
    low: float | None
    """Lower end of the 95% interval; None for a single seed."""
    high: float | None
    pooled: bool = False
    """Whether the variance was pooled over the block."""
    degrees: int = 0
    """Degrees of freedom of the interval."""
    error: float | None = None
    """Standard error of the mean; None for a single seed."""


def paired_difference(arm: Values, baseline: Values) -> Difference | None:
    """From the arm's own differences alone; None without a common seed."""
    deltas = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if not deltas:
        return None
    mean, count = statistics.fmean(deltas), len(deltas)
    if count == 1:
        return Difference(mean, 1, None, None)
    return with_interval(Difference(mean, count, None, None), statistics.variance(deltas) / count, count - 1)


def block_differences(block: Mapping[str, Values], baseline: str) -> dict[str, Difference | None]:
    """Differences of every arm of a block from its baseline, with pooled variance where that is sound.

    Sound means: three arms or more, all with the same two seeds or more, and no sign that they scatter differently.
    Arms that share their runs (DecLLM and DecLLM + BiAttn after pretraining) are one arm here.
    """
    differences = {arm: paired_difference(values, block[baseline]) for arm, values in block.items() if arm != baseline}
    distinct = list({tuple(sorted(values.items())): values for values in block.values()}.values())
    variance = pooled_variance(distinct)
    if variance is None:
        return differences
    seeds = len(block[baseline])
    degrees = (len(distinct) - 1) * (seeds - 1)
    return {arm: d and with_interval(d, 2 * variance / seeds, degrees, pooled=True) for arm, d in differences.items()}


def against_baselines(values: Mapping[str, Values], baselines: Mapping[str, str]) -> dict[str, Difference | None]:
    """The difference of every arm from its baseline, baseline by baseline; a baseline without one of its own is left
    out. baselines: {arm: the arm it is compared with}."""
    found: dict[str, Difference | None] = {}
    for baseline in dict.fromkeys(baselines.values()):
        # A baseline may have one of its own: a rung of a ladder.
        block = {arm: values[arm] for arm in values if arm == baseline or baselines[arm] == baseline}
        if baseline in block:
            found |= block_differences(block, baseline)
    return found


def pooled_variance(block: Sequence[Values]) -> float | None:
    """Residual variance of the additive model arm + seed; None where pooling is not sound."""
    seeds = sorted(block[0]) if block else []
    if len(block) < 3 or len(seeds) < 2 or any(sorted(values) != seeds for values in block):
        return None
    arm_means = [statistics.fmean(values.values()) for values in block]
    seed_means = {seed: statistics.fmean(values[seed] for values in block) for seed in seeds}
    grand = statistics.fmean(arm_means)
    residuals = [
        [values[seed] - mean - seed_means[seed] + grand for seed in seeds]
        for values, mean in zip(block, arm_means, strict=True)
    ]
    if not scatter_alike(residuals):
        return None
    total = sum(residual**2 for row in residuals for residual in row)
    return total / ((len(block) - 1) * (len(seeds) - 1))


def scatter_alike(residuals: Sequence[Sequence[float]]) -> bool:
    """Whether Bartlett's test (1937, Proc. R. Soc. A 160) finds no sign that these rows, of one length, have different
    variances."""
    import numpy as np
    from scipy.special import chdtrc  # scipy.stats has the test, and takes most of a second to be read

    if any(min(row) == max(row) for row in residuals):
        return False  # a constant arm has no scatter to share
    variances = np.var(np.asarray(residuals), axis=1, ddof=1)
    count, degrees = len(residuals), len(residuals[0]) - 1
    statistic = count * degrees * (np.log(variances.mean()) - np.log(variances).mean())
    bias = 1 + (count - 1 / count) / (3 * degrees * (count - 1))
    return bool(chdtrc(count - 1, statistic / bias) >= UNEQUAL)


def with_interval(d: Difference, variance: float, degrees: int, pooled: bool = False) -> Difference:
    """The same estimate, with the 95% interval of one that has this variance."""
    half = half_width(variance, degrees)
    return replace(d, low=d.mean - half, high=d.mean + half, pooled=pooled, degrees=degrees, error=math.sqrt(variance))


def half_width(variance: float, degrees: int) -> float:
    """Half of the 95% interval of an estimate with this variance."""
    return two_sided_critical(1 - CONFIDENCE, degrees) * math.sqrt(variance)
