"""Power laws of a loss: L = E + A x^-a, and L = E + A N^-a + B D^-b, fitted by least squares on the logarithm of L.

The simple law is that of Kaplan et al. (2020, arXiv 2001.08361), with the irreducible loss E that of Hoffmann et al.
(2022, arXiv 2203.15556); the law of parameters N and tokens D is their equation 2, fitted by their approach 3. They
minimise a Huber loss with a threshold of 0.001, which is nearly the absolute deviation. For a few runs with normal
errors it uses two thirds of the information, and there are no outliers, since diverged runs are left out.

Many losses at the same x are fitted at once, for the intervals. A law without E is one matrix product; other laws share
the iterations of the method of Levenberg and Marquardt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PowerLaw:
    """The law L = E + A x^-a."""

    irreducible: float
    """E; 0 in a law without it."""
    coefficient: float
    """A; may exceed the largest float, so prefer `at`."""
    exponent: float

    def at(self, x: float) -> float:
        """The loss at x."""
        return self.irreducible + math.exp(math.log(self.coefficient) - self.exponent * math.log(x))

    def x_for(self, loss: float) -> float:
        """The x at which the law has this loss.

        Infinite for a loss below all losses of the law; nan for any other loss of a law that does not fall.
        """
        level = self.irreducible + self.coefficient  # the one loss of a law with an exponent of zero
        if loss <= self.irreducible or (self.exponent == 0 and loss < level):
            return math.inf
        if self.exponent <= 0:
            return math.nan
        try:
            return math.exp((math.log(self.coefficient) - math.log(loss - self.irreducible)) / self.exponent)
        except OverflowError:
            return math.inf


def fit_power_law(x: Sequence[float], loss: Sequence[float], irreducible: bool = True) -> PowerLaw:
    """The power law of least squares on the logarithm of the loss.

    Raises:
        ValueError: fewer different x than parameters: three with E, two without.
    """
    import numpy as np

    needed = 3 if irreducible else 2
    if len(set(x)) < needed:
        raise ValueError(f"a power law {'with E ' if irreducible else ''}needs {needed} different x or more")
    log_x = np.log(np.asarray(x, float))
    return Laws.fit(log_x, np.log(np.asarray([loss], float)), np.ones(len(log_x)), irreducible).law(0)


@dataclass(frozen=True)
class Laws:
    """Many power laws of one variable, as arrays of one length."""

    log_irreducible: Any
    """log E; minus infinity in laws without it."""
    level: Any
    """log A x^-a at the middle of the data."""
    exponent: Any
    middle: float
    """The log x of `level`, chosen so that level and exponent are nearly uncorrelated."""

    def shifted(self, by: Any) -> Laws:
        """The laws of losses whose logarithm is larger by `by`."""
        return Laws(self.log_irreducible + by, self.level + by, self.exponent, self.middle)

    @classmethod
    def fit(cls, log_x: Any, log_losses: Any, weights: Any, irreducible: bool, near: Laws | None = None) -> Laws:
        """A law for each row of log_losses, of shape rows x points.

        near: one law to start at. Without it, and with few points, the search starts from several values, because
        there may be several local minima.
        """
        import numpy as np

        middle = float(np.average(log_x, weights=weights))
        u = log_x - middle
        if not irreducible:
            fitted = lines(-u[:, None], log_losses, weights)
            return cls(np.full(len(log_losses), -np.inf), fitted[:, 0], fitted[:, 1], middle)
        starts = [] if near is None else [near.rows(len(log_losses), middle)]
        if near is None:
            starts += _starts(u[:, None], log_losses, weights, STARTS)
        elif len(log_x) <= FEW_POINTS:
            starts += _starts(u[:, None], log_losses, weights, STARTS[1:3])
        best = fit_sums(u[:, None], log_losses, weights, starts)
        return cls(best[:, 0], best[:, 1], best[:, 2], middle)

    def rows(self, count: int, middle: float) -> Any:
        """The first law as the starting value of `count` searches about another middle: count x 3."""
        import numpy as np

        level = self.level[0] - self.exponent[0] * (middle - self.middle)
        return np.tile([self.log_irreducible[0], level, self.exponent[0]], (count, 1))

    def law(self, row: int) -> PowerLaw:
        """The law of one row, as plain numbers."""
        level, exponent = float(self.level[row]), float(self.exponent[row])
        coefficient = math.exp(min(700.0, level + exponent * self.middle))
        return PowerLaw(math.exp(float(self.log_irreducible[row])), coefficient, exponent)

    def log_loss(self, log_x: Any) -> Any:
        """log L at each x: rows x points."""
        import numpy as np

        u = np.asarray(log_x) - self.middle
        reducible = self.level[:, None] - self.exponent[:, None] * u
        with np.errstate(invalid="ignore"):  # x may be nan
            return np.logaddexp(self.log_irreducible[:, None], reducible)

    def log_loss_at(self, log_x: Any) -> Any:
        """log L of each law at its own x: rows."""
        import numpy as np

        with np.errstate(invalid="ignore"):  # x is infinite where a law never has a loss
            return np.logaddexp(self.log_irreducible, self.level - self.exponent * (np.asarray(log_x) - self.middle))

    def log_x(self, log_loss: Any) -> Any:
        """log x at which each law has each loss: rows x losses.

        Infinite for a loss below all losses of the law. nan for any other loss of a law that does not fall, and for a
        loss that is nan.

        log_loss: of shape losses, or rows x losses.
        """
        import numpy as np

        log_loss, exponent = np.asarray(log_loss), self.exponent[:, None]
        lowest = self.log_irreducible[:, None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            above = log_loss + np.log1p(-np.exp(lowest - log_loss))
            x = self.middle + (self.level[:, None] - above) / exponent
        level = np.logaddexp(lowest, self.level[:, None])  # the one loss of a law with an exponent of zero
        below = (log_loss <= lowest) | ((exponent == 0) & (log_loss < level))
        return np.where(below, np.inf, np.where(exponent > 0, x, np.nan))


# --- sums of powers -------------------------------------------------------------------------------------------------

STARTS = (0.0, 0.5, 0.8, 0.95)
"""Starting values of E, as shares of the lowest loss."""
FEW_POINTS = 20
"""Largest number of points for which each draw is searched from several starting values."""
NO_E = 12.0
"""Lower bound of log E, below the lowest log loss: for a straight line on log axes it has no minimum."""
STEEPEST = 10.0
"""Largest exponent of the search."""
ROUNDS = 100
"""Largest number of steps of a search."""


def lines(slopes: Any, log_losses: Any, weights: Any) -> Any:
    """Least squares of each row on a constant and the columns of `slopes`: rows x (1 + columns)."""
    import numpy as np

    design = np.column_stack([np.ones(len(slopes)), slopes])
    weighted = design * weights[:, None]
    return log_losses @ weighted @ np.linalg.inv(design.T @ weighted)


def _starts(u: Any, log_losses: Any, weights: Any, shares: Sequence[float]) -> list[Any]:
    """Starting values for E and one power: E as a share of the lowest loss, the rest by a straight line."""
    import numpy as np

    starts = []
    lowest = log_losses.min(axis=1, keepdims=True)
    for share in shares:
        floor = lowest + math.log(max(share, 1e-5))
        above = log_losses + np.log1p(-np.exp(floor - log_losses) * (1 - 1e-9))
        starts.append(np.column_stack([floor, lines(-u, above, weights)]))
    return starts


def fit_sums(u: Any, log_losses: Any, weights: Any, starts: Sequence[Any]) -> Any:
    """The best fit of log(E + A_1 e^(-a_1 u_1) + A_2 e^(-a_2 u_2) ...) to each row, over all starts.

    Args:
        u: logarithms, points x powers.
        log_losses: rows x points.
        weights: of the points.
        starts: each rows x (log E, log A_1, a_1, log A_2, a_2, ...).

    Returns:
        The numbers in the order of the starts: rows x (1 + 2 powers).
    """
    import numpy as np

    rows, count = len(log_losses), len(starts)
    solutions, cost = _descend(u, np.tile(log_losses, (count, 1)), weights, np.concatenate(starts))
    best = cost.reshape(count, rows).argmin(axis=0)
    return solutions.reshape(count, rows, -1)[best, np.arange(rows)]


def _descend(u: Any, y: Any, weights: Any, at: Any) -> tuple[Any, Any]:
    """(minimum, cost) of the Levenberg-Marquardt method from each row of `at`."""
    import numpy as np

    lowest, highest = y.min(axis=1) - NO_E, y.max(axis=1)
    low, high = np.full_like(at, -np.inf), np.full_like(at, np.inf)
    low[:, 0], high[:, 0], low[:, 2::2], high[:, 2::2] = lowest, highest, 0.0, STEEPEST
    at = np.clip(at, low, high)
    root = np.sqrt(weights)
    residual, slope = _residual(u, y, root, at)
    cost, damping, going = (residual**2).sum(axis=1), np.full(len(at), 1e-3), np.arange(len(at))
    diagonal = np.arange(at.shape[1])
    for _ in range(ROUNDS):
        now, jacobian = at[going], slope[going]
        gradient = np.einsum("rpk,rp->rk", jacobian, residual[going])
        held = ((now <= low[going]) & (gradient > 0)) | ((now >= high[going]) & (gradient < 0))
        jacobian = np.where(held[:, None], 0.0, jacobian)
        normal = np.einsum("rpk,rpl->rkl", jacobian, jacobian)
        normal[:, diagonal, diagonal] *= 1 + damping[going, None]
        normal[:, diagonal, diagonal] += 1e-12
        step = np.linalg.solve(normal, np.where(held, 0.0, -gradient)[..., None])[..., 0]
        tried = np.clip(now + step, low[going], high[going])
        new_residual, new_slope = _residual(u, y[going], root, tried)
        new_cost = (new_residual**2).sum(axis=1)
        better = new_cost < cost[going]
        gained = np.where(better, cost[going] - new_cost, np.inf)
        ended = (gained <= 1e-9 * cost[going] + 1e-24) | (damping[going] > 1e10)
        taken = going[better]
        at[taken], residual[taken], slope[taken] = tried[better], new_residual[better], new_slope[better]
        cost[taken] = new_cost[better]
        damping[going] = np.where(better, damping[going] / 10, damping[going] * 4)
        going = going[~ended]
        if not len(going):
            break
    return at, cost


def _residual(u: Any, y: Any, root: Any, at: Any) -> tuple[Any, Any]:
    """Weighted residuals of each row, and their derivatives by the parameters."""
    import numpy as np

    terms = [np.broadcast_to(at[:, :1], y.shape)]
    terms += [at[:, 1 + 2 * k, None] - at[:, 2 + 2 * k, None] * u[:, k] for k in range(u.shape[1])]
    stacked = np.stack(terms)
    top = stacked.max(axis=0)
    total = top + np.log(np.exp(stacked - top).sum(axis=0))
    shares = np.exp(stacked - total) * root
    slopes = [shares[0]]
    for k in range(u.shape[1]):
        slopes += [shares[1 + k], -shares[1 + k] * u[:, k]]
    return (total - y) * root, np.stack(slopes, axis=-1)
