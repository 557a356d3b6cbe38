"""Contrasts of arms, one value for each seed first, then one sample of those values.

A contrast is a weighted sum of arms: an arm minus its baseline, the effect of a factor, the change of a difference by
finetuning. Its interval comes from the variance of its values over the seeds. That is valid whatever the arms have in
common, and for unequal variances. A few seeds estimate this variance badly, so the other contrasts of the same family
lend up to a third of a degree of freedom:

    d   = min(1, s0 / s2) / 3      s2: variance of the contrast's values, nu degrees of freedom
    V   = (d s0 + nu s2) / (d + nu), df = d + nu        s0: pooled variance of the others, for the same coefficients

The loan shrinks where the contrast varies more than the others do, so coverage is at least 93% at any ratio of the two
(docs/statistics.md has the simulations). A procedure that borrows more fails where one arm, the baseline or a family
has another variance than the rest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm.statistics.document_noise import Influences, combined, document_spread
from lit_llm.statistics.paired import Difference, Spread, Values, Variance, with_spread

PRIOR_DEGREES = 1 / 3
"""Largest number of degrees of freedom that the other contrasts lend."""


@dataclass(frozen=True)
class Sample:
    """The values of one contrast, seed by seed."""

    values: Values
    scale: float
    """Sum of the squared coefficients; a variance over this number is comparable between contrasts."""
    documents: Spread | None = None
    """Spread of the mean over documents; None where they are not recorded."""
    document_count: int = 0


def contrast(
    weights: Mapping[str, float], values: Mapping[str, Values], influences: Influences | None = None
) -> Sample:
    """Values of a contrast for every seed that all its arms have.

    weights: {arm: coefficient}; values: {arm: {seed: value}}.
    """
    seeds = sorted(set.intersection(*(set(values.get(arm, ())) for arm in weights)))
    by_seed = {seed: math.fsum(weight * values[arm][seed] for arm, weight in weights.items()) for seed in seeds}
    scale = math.fsum(weight * weight for weight in weights.values())
    spread = document_spread(weights, seeds, influences) if influences and seeds else None
    return Sample(by_seed, scale, *(spread or (None, 0)))


def estimates(samples: Mapping[str, Sample], variance: Variance = "moderated") -> dict[str, Difference | None]:
    """Mean and intervals of every contrast; with `moderated` the contrasts of one call moderate each other.

    A contrast is None without a seed, and has no interval with one seed.
    """
    scatter = {
        name: (statistics.variance(sample.values.values()), len(sample.values) - 1)
        for name, sample in samples.items()
        if len(sample.values) > 1
    }
    others = _Others(samples, scatter) if variance == "moderated" else None
    differences: dict[str, Difference | None] = {}
    for name, sample in samples.items():
        if not sample.values:
            differences[name] = None
            continue
        d = Difference(statistics.fmean(sample.values.values()), len(sample.values), None, None)
        if name in scatter:
            squared, degrees = scatter[name]
            if others is not None and any(sample.values.values()):
                squared, degrees = moderated(squared, degrees, others.variance(name))
            d = with_documents(d, Spread(math.sqrt(squared / len(sample.values)), degrees), sample)
        differences[name] = d
    return differences


def with_documents(d: Difference, seeds: Spread, sample: Sample) -> Difference:
    """The estimate with intervals: over seeds, and over seeds and documents where documents are recorded."""
    if sample.documents is None:
        return with_spread(d, seeds)
    return with_spread(d, seeds, combined(seeds, sample.documents), sample.document_count)


def moderated(variance: Any, degrees: Any, others: Any) -> tuple[Any, Any]:
    """(variance, degrees of freedom) of a contrast, moderated by the pooled variance of the others; arrays too.

    others: None or nan where there are none.
    """
    import numpy as np

    if others is None:
        return variance, degrees
    with np.errstate(divide="ignore", invalid="ignore"):
        lent = PRIOR_DEGREES * np.minimum(
            1.0, np.where(variance > 0, others / np.where(variance > 0, variance, 1.0), 1.0)
        )
    lent = np.where(np.isfinite(others), lent, 0.0)
    variance = (lent * np.where(lent > 0, others, 0.0) + degrees * variance) / (lent + degrees)
    return (variance, lent + degrees) if np.ndim(variance) else (float(variance), float(lent + degrees))


class _Others:
    """Pooled variance of all contrasts but one.

    Contrasts with equal values count once: their arms share their runs. A contrast whose values are all zero does not
    count: its arm shares its runs with the baseline.
    """

    def __init__(self, samples: Mapping[str, Sample], scatter: Mapping[str, tuple[float, int]]) -> None:
        self._key = {name: tuple(sorted(samples[name].values.items())) for name in scatter}
        self._scale = {name: samples[name].scale for name in scatter}
        self._sums = {
            self._key[name]: (variance * degrees / self._scale[name], degrees)
            for name, (variance, degrees) in scatter.items()
            if any(samples[name].values.values())
        }
        self._total = _sum(self._sums.values())

    def variance(self, name: str) -> float | None:
        """Pooled variance of the other contrasts, for the coefficients of this one; None where there are none."""
        excluded = self._sums.get(self._key[name], (0.0, 0))
        degrees = self._total[1] - excluded[1]
        if not degrees:
            return None
        return max(0.0, self._total[0] - excluded[0]) / degrees * self._scale[name]


def _sum(pairs: Iterable[tuple[float, int]]) -> tuple[float, int]:
    pairs = list(pairs)
    return math.fsum(squares for squares, _ in pairs), sum(degrees for _, degrees in pairs)
