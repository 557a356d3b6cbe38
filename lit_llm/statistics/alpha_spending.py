"""Alpha spending: the levels of interim analyses, such that all of them together have the study's level.

The 5% are spent by the function of Lan and DeMets that is like Pocock's bounds (1983, Biometrika 70): at a share s of
the most seeds, ln(1 + (e - 1) s) of the level is spent. It leaves the first analyses enough to stop at. The function of
O'Brien and Fleming spends next to nothing on them.

The levels are exact for normal differences of unknown variance: the t statistics of growing samples are a Markov chain,
and the chance of passing a level for the first time is integrated along it (Armitage, McPherson and Rowe 1969, J. R.
Stat. Soc. A 132, do so for a known variance). Bounds for a known variance, applied to Student's t as is usual, raise
5.8 false alarms in a hundred instead of 5 when the analyses begin at three seeds.

The number of seeds may change after an analysis. Past analyses then keep their levels, and the rest of the level is
spent over those that remain, in proportion to the same function of the new number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

GRID = 320
"""Number of p-values on the grid of the chain; between them its functions are interpolated."""
SMALLEST = 1e-13
"""Smallest p-value on the grid."""
DRAWS = 320
"""Points of the quadrature over the last seed's difference."""


@dataclass(frozen=True)
class PastInterims:
    """Interim analyses made while another number of seeds was the most."""

    sizes: tuple[int, ...]
    """Seeds at each analysis, increasing."""
    most: int
    """Largest number of seeds that was planned then."""


@dataclass(frozen=True)
class Rounds:
    """Interim analyses after the first seeds, then after each further `step` of them up to the most."""

    first: int
    most: int
    step: int = 1
    past: tuple[PastInterims, ...] = ()
    """Analyses before the number of seeds was changed, in their order."""
    lost: float = 0.0
    """Share of the level that was spent on analyses of seeds that are no part of the data any more."""

    def __post_init__(self) -> None:
        fresh = not self.past
        if self.first < 2 or self.step < 1 or self.most < self.first or (fresh and self.most == self.first):
            raise ValueError("rounds need two first seeds or more, more of them at most, and a step of one or more")

    @property
    def past_sizes(self) -> tuple[int, ...]:
        """Seeds at each past analysis."""
        return tuple(sorted({size for past in self.past for size in past.sizes if size <= self.most}))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Seeds at each analysis, past ones included."""
        last = max((size for past in self.past for size in past.sizes), default=0)
        coming = [size for size in (*range(self.first, self.most, self.step), self.most) if size > last]
        return (*self.past_sizes, *coming) or (self.most,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the level that is spent after each analysis."""
        by_size, spent, before = dict[int, float](), self.lost, 0
        for interims in (*self.past, PastInterims(self.sizes, self.most)):
            start, start_spent = before, spent
            for size in interims.sizes:
                if size > before:
                    spent = _spent_share(size / interims.most, start / interims.most, start_spent)
                    by_size[size] = spent
                    before = size
        return tuple(by_size.get(size, self.lost) for size in self.sizes)


def pocock_spending(share: float, level: float) -> float:
    """Part of the level that is spent when this share of the most seeds has been seen."""
    return level * math.log(1 + (math.e - 1) * share)


def _spent_share(seen: float, before: float, spent: float) -> float:
    """Share of the level that is spent when `seen` of the most seeds have been seen, `spent` of it at `before`."""
    if spent >= 1 or before >= 1:
        return 1.0 if before >= 1 else spent
    start = pocock_spending(before, 1.0)
    return spent + (1 - spent) * (pocock_spending(min(seen, 1.0), 1.0) - start) / (1 - start)


@dataclass(frozen=True)
class Chain:
    """Markov chain of one arm's t statistics over its interim analyses where there is no difference, by p-values.

    It runs from the last seed to the first. Given the sum and the sum of squares of n differences, the last difference
    is a coordinate of a point that is uniform on a sphere, whatever the variance.
    """

    sizes: tuple[int, ...]
    """Seeds at each analysis."""
    levels: tuple[float, ...]
    """Level of each single test, such that all together have the level; 0 where nothing is left to spend."""
    _means: tuple[Any, ...]
    """Expected mean at the first analysis given that no level was passed before, for each analysis and p on the grid,
    for a positive mean, in units of the root sum of squares."""

    def unbiased(self, interim: int, raw: float, root_sum_of_squares: float) -> float:
        """Absolute value of the unbiased estimate of a difference that was last tested at this interim analysis.

        It is the expected mean at the first analysis, given the data and that no level was passed before (Emerson and
        Fleming 1990, Biometrika 77): unbiased over all ways in which the analyses can end. At the first analysis it is
        the mean itself.

        Args:
            interim: number of the analysis, counted from zero.
            raw: two-sided p-value of the single test at this analysis.
            root_sum_of_squares: of the arm's differences from its baseline, in the metric's unit.
        """
        import numpy as np

        return root_sum_of_squares * float(np.interp(math.log(max(raw, SMALLEST)), _grid(), self._means[interim]))


@lru_cache(maxsize=64)
def chain(rounds: Rounds, level: float) -> Chain:
    """Chain of the interim analyses of these rounds, which together have this level."""
    import numpy as np

    sizes, grid = rounds.sizes, np.exp(_grid())
    stayed = np.ones(len(grid))  # for each p at this analysis: the chance of having passed no level before
    mean = _standardised_mean(sizes[0], grid)
    levels, means = list[float](), list[Any]()
    spent, now = level * rounds.lost, sizes[0]
    for size, share in zip(sizes, rounds.shares, strict=True):
        while now < size:
            level_now = levels[-1] if now in sizes else 0.0
            stayed, mean = _add_seed(now, stayed, mean, level_now)
            now += 1
        below = np.concatenate([[stayed[0] * grid[0]], (stayed[1:] + stayed[:-1]) / 2 * np.diff(grid)]).cumsum()
        due = level * share - spent
        levels.append(float(np.interp(due, below, grid)) if due > 1e-12 else 0.0)
        means.append(mean / np.maximum(stayed, 1e-300))
        spent = max(spent, level * share)
    return Chain(sizes, tuple(levels), tuple(means))


def _add_seed(size: int, stayed: Any, mean: Any, level: float) -> tuple[Any, Any]:
    """(`stayed`, `mean`) as functions of p with one more seed. level: of the test at this size; 0 without a test."""
    import numpy as np

    # In units of the root of the sum of squares of size + 1 differences: their sum, what their mean leaves, the last.
    u = _standardised_sum(size + 1, np.exp(_grid()))[:, None]
    last = u / math.sqrt(size + 1) + math.sqrt(size / (size + 1)) * np.sqrt(1 - u * u) * _coordinates(size)
    root = np.sqrt(np.maximum(1 - last * last, 1e-300))
    before = np.clip((u * math.sqrt(size + 1) - last) / root / math.sqrt(size), -1, 1)
    at, nodes = np.abs(before), _standardised_sum(size, np.exp(_grid()))[::-1]
    goes_on = at <= float(_standardised_sum(size, level))
    still = np.where(goes_on, np.interp(at, nodes, stayed[::-1]), 0.0)
    seen = np.where(goes_on, np.sign(before) * root * np.interp(at, nodes, mean[::-1]), 0.0)
    return still.mean(1), seen.mean(1)


@lru_cache
def _grid() -> Any:
    """Logarithms of p-values, increasing: evenly spaced in p where p is large, and in log p below."""
    import numpy as np

    ps = np.unique(np.concatenate([np.geomspace(SMALLEST, 1, GRID // 2), np.linspace(0, 1, GRID // 2 + 2)[1:-1]]))
    return np.log(ps)


@lru_cache(maxsize=256)
def _coordinates(dimension: int) -> Any:
    """Equally likely values of one coordinate of a uniform point on the unit sphere of this dimension."""
    import numpy as np
    from scipy.special import betaincinv

    half = (dimension - 1) / 2
    return 2 * betaincinv(half, half, (np.arange(DRAWS) + 0.5) / DRAWS) - 1


def _standardised_sum(size: int, p: Any) -> Any:
    """Sum of `size` differences over the root of (size x sum of squares), for the p-value of a positive mean."""
    import numpy as np
    from scipy.special import stdtrit

    t = -stdtrit(size - 1, np.maximum(p, 1e-100) / 2)
    return np.where(p > 0, t / np.sqrt(t * t + size - 1), 1.0)


def _standardised_mean(size: int, p: Any) -> Any:
    """Mean of `size` differences in units of the root of their sum of squares."""
    return _standardised_sum(size, p) / math.sqrt(size)
