"""Paired differences over seeds, with 95% intervals over seeds and over documents.

Two arms with one seed share data, order and the initial values of their common parameters, so most of a seed's effect
cancels in their difference. The variance of a difference comes from its values over the seeds: variances may differ
between arms, and a family of models may react to a seed in its own way, which a variance pooled over arms ignores.
`contrasts` moderates this variance a little by that of the other differences. `document_noise` adds the choice of the
documents on which the arms are judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lit_llm.statistics.multiple_comparisons import two_sided_critical, two_sided_p

Values = Mapping[int, float]
"""{seed: value} of one arm."""

Variance = Literal["moderated", "paired", "pooled", "mixed"]
"""Source of the variance of a difference; see `compare.variance`."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Standard error of an estimate, with its degrees of freedom."""

    error: float
    degrees: float

    def half_width(self, level: float = 1 - CONFIDENCE) -> float:
        """Half of the two-sided interval that misses with probability `level`."""
        return two_sided_critical(level, self.degrees) * self.error

    def p(self, distance: float) -> float:
        """Two-sided p-value of an estimate at this distance from the hypothesis."""
        if not self.error:  # an arm that equals its baseline to the last bit
            return 0.0 if distance else 1.0
        return two_sided_p(distance / self.error, self.degrees)


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of a contrast, for example an arm minus its baseline.

    `low` and `high` are the ends of the 95% interval: for other seeds and other documents where the losses of single
    documents are recorded, otherwise for other seeds on the same documents.
    """

    mean: float
    seeds: int
    low: float | None
    """Lower end of the 95% interval; None for a single seed."""
    high: float | None
    pooled: bool = False
    """Whether the variance was pooled over the arms (`compare.variance: pooled` or `mixed`)."""
    degrees: float = 0
    """Degrees of freedom of the interval."""
    error: float | None = None
    """Standard error of the mean; None for a single seed."""
    documents: int = 0
    """Number of documents that the interval treats as a sample; 0 if it holds for the same documents only."""
    seeds_low: float | None = None
    """Lower end of the 95% interval over seeds, on the same documents."""
    seeds_high: float | None = None
    seeds_degrees: float = 0
    seeds_error: float | None = None

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """Standard errors over seeds, and over seeds and documents."""
        both = ((self.seeds_error, self.seeds_degrees), (self.error, self.degrees))
        return tuple(dict.fromkeys(Spread(error, degrees) for error, degrees in both if error is not None))

    def half_width(self, level: float = 1 - CONFIDENCE) -> float:
        """Half of the interval at this level: the wider of that over seeds and that over seeds and documents."""
        return max(spread.half_width(level) for spread in self.spreads)

    def p(self, hypothesis: float = 0.0) -> float:
        """Two-sided p-value of the test that the true difference is `hypothesis`; it agrees with `half_width`."""
        return max(spread.p(abs(self.mean - hypothesis)) for spread in self.spreads)


def with_spread(d: Difference, seeds: Spread, both: Spread | None = None, documents: int = 0) -> Difference:
    """The same estimate with intervals over seeds, and over seeds and documents where these are recorded."""
    chosen, alone = both or seeds, seeds.half_width()
    d = replace(
        d,
        degrees=chosen.degrees,
        error=chosen.error,
        documents=documents if both else 0,
        seeds_low=d.mean - alone,
        seeds_high=d.mean + alone,
        seeds_degrees=seeds.degrees,
        seeds_error=seeds.error,
    )
    half = d.half_width()
    return replace(d, low=d.mean - half, high=d.mean + half)


def paired_difference(arm: Values, baseline: Values) -> Difference | None:
    """Difference of two arms with the interval of the paired t-test; None without a shared seed."""
    deltas = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if not deltas:
        return None
    d = Difference(statistics.fmean(deltas), len(deltas), None, None)
    if len(deltas) == 1:
        return d
    return with_spread(d, Spread(math.sqrt(statistics.variance(deltas) / len(deltas)), len(deltas) - 1))


def mean_spread(values: Values) -> Spread | None:
    """Spread of a mean over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    return Spread(math.sqrt(statistics.variance(values.values()) / len(values)), len(values) - 1)
