"""The choice of documents as a source of noise.

All arms and seeds are judged on the same held-out documents, so the scatter over seeds does not contain their choice.
It is estimated from the losses of single documents. A metric is a ratio: the sum of the documents' losses over the sum
of their weights (tokens or bytes). The influence of a document g with mean loss x_g is

    u_g = p_g (x_g − x),    p_g = weight of g / weight of all

The variance over documents is the sum of u_g², corrected for the mean that was subtracted. The documents are clusters
of any sizes (a delete-one or CR2 variance of a weighted mean: Bell and McCaffrey 2002, Survey Methodology 28, with
their degrees of freedom). For a difference, u_g is the influence on the difference, averaged over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_llm.evaluation.unit_losses import Units
from lit_llm.statistics.paired import Spread

Influences = Mapping[tuple[str, int], "Influence"]
"""{(arm, seed): influences of the documents on that run}"""


@dataclass(frozen=True)
class Influence:
    """Influence of each document on one run's metric."""

    names: tuple[str, ...]
    """Names of the documents."""
    shares: Any
    """p_g, an array."""
    values: Any
    """u_g, an array."""


MIN_EFFECTIVE_DOCUMENTS = 2.0
"""Effective documents, 1 / Σ p², below which one outweighs the others and their choice has no estimable variance."""


def influence(units: Units, exponential: bool = False) -> Influence | None:
    """Influences of one run's documents; None for fewer than two effective documents.

    exponential: the metric is e to the power of the ratio (perplexity), and its influences are those of its slope.
    """
    import numpy as np

    names = _interned(tuple(sorted(name for name, (_, weight) in units.items() if weight > 0)))
    if len(names) < 2:
        return None
    sums, weights = np.array([units[name] for name in names], dtype=np.float64).T
    total = weights.sum()
    if total**2 / (weights**2).sum() < MIN_EFFECTIVE_DOCUMENTS - 1e-9:
        return None
    mean = sums.sum() / total
    slope = math.exp(min(mean, 700.0)) if exponential else 1.0
    return Influence(names, weights / total, slope * (sums - mean * weights) / total)


@lru_cache(maxsize=256)
def _interned(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names as one object that runs share, so that thousands of contrasts compare objects, not names."""
    return names


def document_spread(
    weights: Mapping[str, float], seeds: Sequence[int], influences: Influences
) -> tuple[Spread, int] | None:
    """(spread over documents, number of documents) of a contrast of arms, averaged over seeds.

    weights: {arm: coefficient}. None where a run has no records, or the runs were not judged on the same documents.
    """
    parts = [(weight, influences.get((arm, seed))) for arm, weight in weights.items() for seed in seeds]
    recorded = [(weight, part) for weight, part in parts if part is not None]
    if not recorded or len(recorded) < len(parts):
        return None
    first = recorded[0][1].names
    if any(part.names is not first and part.names != first for _, part in recorded):
        return None
    effect = sum(weight * part.values for weight, part in recorded) / len(seeds)
    shares = sum(part.shares for _, part in recorded) / len(recorded)
    return clustered(effect, shares), len(shares)


def clustered(effect: Any, shares: Any) -> Spread:
    """Spread of a weighted mean over clusters. effect: u_g; shares: p_g, which sum to 1."""
    factor, degrees = small_sample(shares)
    return Spread(math.sqrt(factor * float((effect**2).sum())), degrees)


def small_sample(shares: Any) -> tuple[float, float]:
    """(factor of Σ u², degrees of freedom) of the variance over clusters with these shares.

    With M = I − 1 p' and B = M' diag(p²) M the factor is Σ p² / tr B, the degrees of freedom (tr B)² / tr B².
    """
    s2, s3, s4, s5 = (float((shares**power).sum()) for power in (2, 3, 4, 5))
    trace = s2 - 2 * s3 + s2 * s2
    # B = D − q p' − p q' + s2 p p' with D = diag(p²), q = p²: the squares and products of its parts, summed.
    square = s4 + 2 * (s4 * s2 + s3 * s3) + s2**4 + 2 * (-2 * s5 + s2 * s4 - 2 * s2 * s2 * s3)
    return s2 / trace, trace * trace / square


def combined(*spreads: Spread) -> Spread:
    """Spread of a sum of independent errors, degrees of freedom by Satterthwaite (1946, Biometrics Bulletin 2)."""
    variance = sum(spread.error**2 for spread in spreads)
    if not variance:
        return spreads[0]
    below = sum(spread.error**4 / spread.degrees for spread in spreads)
    return Spread(math.sqrt(variance), variance**2 / below)
