"""The levels of repeated looks: an error that is spent look by look, and never twice.

The 5% are spent over the looks by the function of Lan and DeMets that is like Pocock's bounds (1983, Biometrika 70): at
a share s of the most seeds, ln(1 + (e - 1) s) of the level is spent. It leaves the first looks enough to stop at; that
of O'Brien and Fleming spends next to nothing on them.

Where the number of seeds changes after a look, what was spent stays spent: past looks keep their levels, and the rest
of the level is spent over the looks that remain, in proportion to the same function of the new number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

NODES = 200
"""Of the quadrature over where the sum of the increments can be."""
REACH = 12.0
"""Standard deviations beyond which a sum of normal increments is taken not to be."""


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


class Walk:
    """The sum of normal increments, look by look, as long as it has passed no bound.

    The chance of passing a bound for the first time is integrated from look to look over where the sum can be
    (Armitage, McPherson and Rowe 1969, J. R. Stat. Soc. A 132).
    """

    def __init__(self, drift: float = 0.0, nodes: int = NODES) -> None:
        """drift: the mean of one increment, in its standard deviations."""
        import numpy as np

        self.drift = drift
        self._nodes, self._weights = np.polynomial.legendre.leggauss(nodes)
        self.size = 0
        self._place, self._mass = np.zeros(1), np.ones(1)
        self._step = 0.0

    def advance(self, size: int) -> None:
        """Go on to the look at this number of increments."""
        self._place = self._place + self.drift * (size - self.size)
        self._step = math.sqrt(size - self.size)
        self.size = size

    def passing(self, bound: float) -> float:
        """Probability that the sum passes the bound at this look, in either direction, and passed none before."""
        from scipy.special import ndtr

        above, below = (self._place - bound) / self._step, (-bound - self._place) / self._step
        return float(self._mass @ (ndtr(above) + ndtr(below)))

    def mean_beyond(self, bound: float) -> float:
        """Expectation of the sum where it passes the bound at this look, zero elsewhere."""
        from scipy.special import ndtr

        above, below = (bound - self._place) / self._step, (-bound - self._place) / self._step
        tails = self._place * (ndtr(-above) + ndtr(below)) + self._step * (_density(above) - _density(below))
        return float(self._mass @ tails)

    def mean(self) -> float:
        """Expectation of the sum where it has passed no bound before this look, zero elsewhere."""
        return float(self._mass @ self._place)

    def stay(self, bound: float) -> None:
        """Keep what lies within the bound."""
        reach = min(bound, REACH * math.sqrt(self.size) + abs(self.drift) * self.size)
        inside = reach * self._nodes
        density = _density((inside[:, None] - self._place) / self._step) / self._step @ self._mass
        self._place, self._mass = inside, density * reach * self._weights


def _density(z: Any) -> Any:
    import numpy as np

    return np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def even_shares(sizes: Sequence[int]) -> tuple[float, ...]:
    """Shares of the level after each look, where the last one is at the most seeds and none was planned otherwise."""
    return tuple(pocock_spending(size / sizes[-1], 1.0) for size in sizes)


@lru_cache
def bounds(sizes: tuple[int, ...], shares: tuple[float, ...], level: float, lost: float = 0.0) -> tuple[float, ...]:
    """Bounds of the sum of normal increments at each look, such that all looks together have the level.

    sizes: increments at each look; shares: part of the level that is spent after each; lost: part that was spent
    before the first. A look for which nothing is left has an infinite bound.
    """
    from scipy.optimize import brentq

    walk, found, before = Walk(), list[float](), lost
    for size, share in zip(sizes, shares, strict=True):
        walk.advance(size)
        due, before = level * (share - before), share
        bound = math.inf
        if due > 1e-12:
            high = REACH * math.sqrt(size)
            bound = float(brentq(lambda b: walk.passing(b) - due, 0.0, high, xtol=1e-12))  # noqa: B023
        found.append(bound)
        walk.stay(bound)
    return tuple(found)


def spent_levels(
    sizes: tuple[int, ...], level: float, shares: tuple[float, ...] | None = None, lost: float = 0.0
) -> tuple[float, ...]:
    """The two-sided level of each look, such that all together have this one. shares, lost: see `bounds`."""
    from scipy.special import ndtr

    found = bounds(sizes, shares or even_shares(sizes), level, lost)
    return tuple(float(2 * ndtr(-bound / math.sqrt(size))) for bound, size in zip(found, sizes, strict=True))
