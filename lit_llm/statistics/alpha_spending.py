"""The levels of repeated looks: an error that is spent look by look, and never twice.

The 5% are spent over the looks by the function of Lan and DeMets that is like Pocock's bounds (1983, Biometrika 70): at
a share s of the most seeds, ln(1 + (e - 1) s) of the level is spent. It leaves the first looks enough to stop at; that
of O'Brien and Fleming spends next to nothing on them.

The levels are exact for normal differences of unknown variance: the t statistics of growing samples are a Markov chain,
and the chance of passing a level for the first time is integrated along it (Armitage, McPherson and Rowe 1969, J. R.
Stat. Soc. A 132, do so for a known variance). Bounds for a known variance that are asked of Student's t, as is usual,
raise 5.8 false alarms in a hundred in place of 5 when the looks begin at three seeds.

Where the number of seeds changes after a look, what was spent stays spent: past looks keep their levels, and the rest
of the level is spent over the looks that remain, in proportion to the same function of the new number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

GRID = 320
"""p-values at which what has happened before a look is known; between them it is interpolated."""
SMALLEST = 1e-13
"""Of these p-values."""
DRAWS = 320
"""Of the quadrature over the last seed's difference."""


@dataclass(frozen=True)
class PastLooks:
    """Looks that were taken while another number of seeds was the most."""

    sizes: tuple[int, ...]
    """Seeds at each of them, increasing."""
    most: int
    """Seeds that there were to be at most."""


@dataclass(frozen=True)
class Rounds:
    """Looks after the first seeds, then after each further `step` of them up to the most."""

    first: int
    most: int
    step: int = 1
    past: tuple[PastLooks, ...] = ()
    """Looks before the number of seeds was changed, in their order."""
    lost: float = 0.0
    """Share of the level that was spent on looks at other seeds, which are no part of the data any more."""

    def __post_init__(self) -> None:
        fresh = not self.past
        if self.first < 2 or self.step < 1 or self.most < self.first or (fresh and self.most == self.first):
            raise ValueError("rounds need two first seeds or more, more of them at most, and a step of one or more")

    @property
    def looked(self) -> tuple[int, ...]:
        """Seeds at each past look."""
        return tuple(sorted({size for past in self.past for size in past.sizes if size <= self.most}))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Seeds at each look, past ones included."""
        last = max((size for past in self.past for size in past.sizes), default=0)
        coming = [size for size in (*range(self.first, self.most, self.step), self.most) if size > last]
        return (*self.looked, *coming) or (self.most,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the level that is spent after each look."""
        found, spent, before = dict[int, float](), self.lost, 0
        for looks in (*self.past, PastLooks(self.sizes, self.most)):
            start, start_spent = before, spent
            for size in looks.sizes:
                if size > before:
                    spent = _share(size / looks.most, start / looks.most, start_spent)
                    found[size] = spent
                    before = size
        return tuple(found.get(size, self.lost) for size in self.sizes)


def pocock_spending(share: float, level: float) -> float:
    """Part of the level that is spent when this share of the most seeds has been seen."""
    return level * math.log(1 + (math.e - 1) * share)


def _share(seen: float, before: float, spent: float) -> float:
    """Share of the level that is spent when `seen` of the most seeds have been seen, `spent` of it at `before`."""
    if spent >= 1 or before >= 1:
        return 1.0 if before >= 1 else spent
    start = pocock_spending(before, 1.0)
    return spent + (1 - spent) * (pocock_spending(min(seen, 1.0), 1.0) - start) / (1 - start)


@dataclass(frozen=True)
class Chain:
    """All looks of one arm where there is no difference, by the p-values of its t statistics.

    Runs from the last seed to the first: given the sum and the sum of squares of n differences, the last of them is a
    coordinate of a point that is uniform on a sphere, whatever the variance.
    """

    sizes: tuple[int, ...]
    """Seeds at each look."""
    levels: tuple[float, ...]
    """Level of each look's own test, such that all together have the level; 0 where nothing is left to spend."""
    _means: tuple[Any, ...]
    """Of each look and p on the grid: the first look's mean that is expected where no level was passed before, for a
    positive mean and in root sums of squares."""

    def unbiased(self, look: int, raw: float, root_sum_of_squares: float) -> float:
        """Size of the unbiased estimate of a difference that was last looked at here.

        It is the mean at the first look that is expected given the data and that no level was passed before (Emerson
        and Fleming 1990, Biometrika 77): unbiased over all ways in which the looks can end. At the first look, the mean
        itself.

        Args:
            look: counted from zero.
            raw: two-sided p-value of the look's own test.
            root_sum_of_squares: of the arm's differences from its baseline, in the metric's unit.
        """
        import numpy as np

        return root_sum_of_squares * float(np.interp(math.log(max(raw, SMALLEST)), _grid(), self._means[look]))


@lru_cache(maxsize=64)
def chain(rounds: Rounds, level: float) -> Chain:
    """The looks of rounds whose false alarms are spent as the rounds say, up to this level."""
    import numpy as np

    sizes, grid = rounds.sizes, np.exp(_grid())
    stayed = np.ones(len(grid))  # of each p at this look: the chance of having passed no level before
    mean = _mean_of(sizes[0], grid)
    levels, means = list[float](), list[Any]()
    spent, now = level * rounds.lost, sizes[0]
    for size, share in zip(sizes, rounds.shares, strict=True):
        while now < size:
            at_look = levels[-1] if now in sizes else 0.0
            stayed, mean = _one_seed_more(now, stayed, mean, at_look)
            now += 1
        below = np.concatenate([[stayed[0] * grid[0]], (stayed[1:] + stayed[:-1]) / 2 * np.diff(grid)]).cumsum()
        due = level * share - spent
        levels.append(float(np.interp(due, below, grid)) if due > 1e-12 else 0.0)
        means.append(mean / np.maximum(stayed, 1e-300))
        spent = max(spent, level * share)
    return Chain(sizes, tuple(levels), tuple(means))


def _one_seed_more(size: int, stayed: Any, mean: Any, level: float) -> tuple[Any, Any]:
    """The same functions of p one seed later. level: what ended the arm at this size; 0 where nobody looked."""
    import numpy as np

    # In units of the root of the sum of squares of size + 1 differences: their sum, what their mean leaves, the last.
    u = _u_of(size + 1, np.exp(_grid()))[:, None]
    last = u / math.sqrt(size + 1) + math.sqrt(size / (size + 1)) * np.sqrt(1 - u * u) * _coordinates(size)
    root = np.sqrt(np.maximum(1 - last * last, 1e-300))
    before = np.clip((u * math.sqrt(size + 1) - last) / root / math.sqrt(size), -1, 1)
    at, known = np.abs(before), _u_of(size, np.exp(_grid()))[::-1]
    goes_on = at <= float(_u_of(size, level))
    still = np.where(goes_on, np.interp(at, known, stayed[::-1]), 0.0)
    seen = np.where(goes_on, np.sign(before) * root * np.interp(at, known, mean[::-1]), 0.0)
    return still.mean(1), seen.mean(1)


@lru_cache
def _grid() -> Any:
    """Logarithms of p-values, increasing: even in p where it is large, and in its logarithm below."""
    import numpy as np

    ps = np.unique(np.concatenate([np.geomspace(SMALLEST, 1, GRID // 2), np.linspace(0, 1, GRID // 2 + 2)[1:-1]]))
    return np.log(ps)


@lru_cache(maxsize=256)
def _coordinates(dimension: int) -> Any:
    """A coordinate of a point that is uniform on the unit sphere of this dimension: equally likely values."""
    import numpy as np
    from scipy.special import betaincinv

    half = (dimension - 1) / 2
    return 2 * betaincinv(half, half, (np.arange(DRAWS) + 0.5) / DRAWS) - 1


def _u_of(size: int, p: Any) -> Any:
    """Sum of so many differences, by the root of their number and of their sum of squares, for p of a positive mean."""
    import numpy as np
    from scipy.special import stdtrit

    t = -stdtrit(size - 1, np.maximum(p, 1e-100) / 2)
    return np.where(p > 0, t / np.sqrt(t * t + size - 1), 1.0)


def _mean_of(size: int, p: Any) -> Any:
    """Mean of so many differences in units of the root of their sum of squares."""
    return _u_of(size, p) / math.sqrt(size)
