"""Scaling: how the loss falls with training FLOPs, parameters or tokens, and how many times the compute a group needs.

A power law of each group of runs, L = E + A x^-a, or without the irreducible loss E (Kaplan et al. 2020, arXiv
2001.08361; Hoffmann et al. 2022, arXiv 2203.15556, section 3.3), by least squares on the logarithm of the loss. There a
Huber loss of 0.001 is used, which is nearly the absolute deviation: against the scatter of seeds it would throw away
a third of what few runs know, and runs that diverged are not among them anyway.

Intervals are a bootstrap over the runs: what a run deviates from its group's curve is dealt out anew among the runs of
the group, and the curve is fitted again. The x stay, for they were chosen. The deviations of n runs are grown by
√(n / (n − p)), for the p numbers that were fitted, and by the ratio of Student's to the normal quantile, so that a
straight line gets its textbook interval (as the expanded percentile of Hesterberg 2015, arXiv 1411.5279, does for a
mean). This tells how sure a curve is if it is a power law, and nothing of what lies outside of the data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.analysis.paired import CONFIDENCE, Spread

X = Literal["train_flops", "parameters", "tokens"]

RESAMPLES = 400
SAME_BUDGET = 1.1
"""Runs whose FLOPs differ by no more than this factor spent the same."""


@dataclass(frozen=True)
class ScalingRun:
    """One finished run."""

    group: str
    train_flops: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float | None = None
    """None where nothing is left to estimate the scatter from."""
    high: float | None = None


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A x^-a."""

    irreducible: float
    """E; 0 where it was not asked for."""
    coefficient: float
    """A; may be beyond what a float holds, so use `at`."""
    exponent: float

    def at(self, x: float) -> float:
        return self.irreducible + math.exp(math.log(self.coefficient) - self.exponent * math.log(x))

    def x_for(self, loss: float) -> float:
        """Where it has this loss; infinite where it never has."""
        if loss <= self.irreducible or self.exponent <= 0:
            return math.inf
        try:
            return math.exp((math.log(self.coefficient) - math.log(loss - self.irreducible)) / self.exponent)
        except OverflowError:
            return math.inf


def fit_power_law(x: Sequence[float], loss: Sequence[float], irreducible: bool = True) -> PowerLaw:
    """By least squares on the logarithm of the loss.

    Raises ValueError for fewer different x than it has numbers to fit: three with E, two without.
    """
    needed = 3 if irreducible else 2
    if len(set(x)) < needed:
        raise ValueError(f"a power law {'with E ' if irreducible else ''}needs {needed} different x or more")
    return _fit(x, loss, irreducible, None)


STARTS = (0.0, 0.5, 0.8, 0.95)
"""E as a share of the lowest loss, where a search for the best fit begins: it has more than one valley."""


def _fit(x: Sequence[float], loss: Sequence[float], irreducible: bool, near: PowerLaw | None) -> PowerLaw:
    """near: begin at this one alone."""
    import numpy as np
    from scipy.optimize import least_squares

    log_x, log_loss = np.log(np.asarray(x, float)), np.log(np.asarray(loss, float))
    middle = log_x.mean()  # so that A and a are not traded for each other
    u = log_x - middle
    slope, level = np.polyfit(u, log_loss, 1)
    if not irreducible:
        return _law(0.0, level, -slope, middle)

    # E and A as logarithms, so that neither is negative.
    def residuals(p: Any) -> Any:
        return np.logaddexp(p[0], p[1] - p[2] * u) - log_loss

    def jacobian(p: Any) -> Any:
        share = np.exp(p[0] - np.logaddexp(p[0], p[1] - p[2] * u))
        return np.stack([share, 1 - share, -(1 - share) * u], axis=1)

    starts = []
    if near is not None:
        at_middle = math.log(near.coefficient) - near.exponent * middle
        starts.append([math.log(max(near.irreducible, 1e-6)), at_middle, near.exponent])
    for part in STARTS if near is None else ():
        floor = max(part, 1e-6) * math.exp(log_loss.min())
        slope, level = np.polyfit(u, np.log(np.exp(log_loss) - floor * (1 - 1e-9)), 1)
        starts.append([math.log(floor), level, -slope])
    # In a straight line on log axes E is nothing, and its logarithm would wander off for ever.
    bounds = ([-14.0, -np.inf, 0.0], [float(log_loss.max()), np.inf, 10.0])
    found = [
        least_squares(residuals, np.clip(start, *bounds), jacobian, bounds=bounds, x_scale="jac", max_nfev=200)
        for start in starts
    ]
    best = min(found, key=lambda fit: float(fit.cost)).x
    return _law(math.exp(best[0]), best[1], best[2], middle)


def _law(irreducible: float, level: float, exponent: float, middle: float) -> PowerLaw:
    """level: log A x^-a in the middle."""
    return PowerLaw(float(irreducible), math.exp(min(700.0, level + exponent * middle)), float(exponent))


# --- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The power law of one group."""

    group: str
    runs: int
    low: float
    """The least x of its runs."""
    high: float
    irreducible: Estimate
    exponent: Estimate
    law: PowerLaw
    scatter: float
    """Standard deviation of the runs about the curve, relative to the loss."""
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, low, high) within the data: where the curve lies, at each x with 95%; empty without intervals."""


@dataclass(frozen=True)
class Multiplier:
    """How many times the x of the baseline's group another group needs for the same loss."""

    group: str
    baseline: str
    best: float
    """The lowest loss that both curves reach within their data."""
    worst: float
    """The highest."""
    mean: Estimate
    """Geometric mean between the two losses, evenly in the baseline's log x."""
    at_best: Estimate


@dataclass(frozen=True)
class IsoFlop:
    """The runs of one group that spent the same FLOPs: which size is best?"""

    group: str
    train_flops: float
    sizes: int
    parameters: float | None
    """Of the lowest loss, by a parabola in log parameters; None where it has no lowest point between its sizes."""
    loss: float | None
    points: tuple[tuple[float, float], ...] = ()
    """(parameters, loss) of its runs."""
    parabola: tuple[tuple[float, float], ...] = ()
    """(parameters, loss) from its smallest to its largest size."""


@dataclass(frozen=True)
class Scaling:
    """All groups."""

    x: X
    metric: str
    irreducible: bool
    curves: tuple[Curve, ...]
    multipliers: tuple[Multiplier, ...]
    isoflops: tuple[IsoFlop, ...]
    notes: tuple[str, ...]
    runs: tuple[ScalingRun, ...] = ()
    """What all of it is of."""


def scaling(
    runs: Sequence[ScalingRun],
    metric: str,
    baseline: str,
    x: X = "train_flops",
    irreducible: bool = True,
    resamples: int = RESAMPLES,
) -> Scaling:
    """The curve of every group, and how each compares with the baseline's."""
    fitted, notes = dict[str, _Fitted](), []
    for group in dict.fromkeys(run.group for run in runs):
        own = [run for run in runs if run.group == group]
        try:
            fitted[group] = _fitted([getattr(run, x) for run in own], [run.loss for run in own], irreducible, resamples)
        except ValueError as error:
            notes.append(f"{group}: no curve yet: {error}")
    curves = tuple(_curve(group, found, irreducible) for group, found in fitted.items())
    multipliers = []
    for group, found in fitted.items():
        if group == baseline or baseline not in fitted:
            continue
        multiplier = _multiplier(group, found, baseline, fitted[baseline])
        if multiplier is None:
            notes.append(f"{group} and {baseline} reach no loss in common, so their {x} are not compared")
        else:
            multipliers.append(multiplier)
    if curves:
        notes.append("intervals: a bootstrap over runs; they hold within the data, if the curves are power laws")
    minima = tuple(isoflop_minima(runs))
    return Scaling(x, metric, irreducible, curves, tuple(multipliers), minima, tuple(notes), tuple(runs))


@dataclass(frozen=True)
class _Fitted:
    x: Sequence[float]
    law: PowerLaw
    resampled: tuple[PowerLaw, ...]
    scatter: float


def _fitted(x: Sequence[float], loss: Sequence[float], irreducible: bool, resamples: int) -> _Fitted:
    import numpy as np
    from scipy.stats import norm

    law = fit_power_law(x, loss, irreducible)
    free = len(x) - (3 if irreducible else 2)
    if free < 1:
        return _Fitted(x, law, (), 0.0)
    on_curve = np.log([law.at(value) for value in x])
    residuals = np.log(loss) - on_curve
    residuals = (residuals - residuals.mean()) * math.sqrt(len(x) / free)
    few = Spread(1.0, free).half_width() / float(norm.ppf(0.5 + CONFIDENCE / 2))
    random = np.random.default_rng(0)  # the same report each time
    again = [np.exp(on_curve + few * random.choice(residuals, len(x))).tolist() for _ in range(resamples)]
    laws = tuple(_fit(x, values, irreducible, law) for values in again)
    return _Fitted(x, law, laws, float(np.sqrt((residuals**2).mean())))


def _curve(group: str, found: _Fitted, irreducible: bool) -> Curve:
    e = _estimate(found.law.irreducible, [law.irreducible for law in found.resampled] if irreducible else ())
    a = _estimate(found.law.exponent, [law.exponent for law in found.resampled])
    ends = min(found.x), max(found.x)
    return Curve(group, len(found.x), *ends, e, a, found.law, found.scatter, tuple(_band(found, *ends)))


def _band(found: _Fitted, low: float, high: float) -> Iterator[tuple[float, float, float]]:
    for place in _evenly(math.log(low), math.log(high)) if found.resampled else ():
        x = math.exp(place)
        at = _estimate(found.law.at(x), [law.at(x) for law in found.resampled])
        assert at.low is not None
        assert at.high is not None
        yield x, at.low, at.high


def _evenly(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]


def _estimate(value: float, resampled: Sequence[float]) -> Estimate:
    """The middle 95% of what the resampled runs give."""
    if not resampled:
        return Estimate(value)
    ordered = sorted(resampled)
    aside = max(0, math.floor((1 - CONFIDENCE) / 2 * (len(ordered) + 1)) - 1)
    return Estimate(value, ordered[aside], ordered[-1 - aside])


POINTS = 21


def _multiplier(group: str, found: _Fitted, baseline: str, base: _Fitted) -> Multiplier | None:
    best = max(law.at(max(x)) for law, x in ((found.law, found.x), (base.law, base.x)))
    worst = min(law.at(min(x)) for law, x in ((found.law, found.x), (base.law, base.x)))
    if best >= worst:
        return None
    ends = [math.log(base.law.x_for(loss)) for loss in (worst, best)]
    losses = [base.law.at(math.exp(place)) for place in _evenly(*ends)]

    def ratio(law: PowerLaw, other: PowerLaw, at: Sequence[float]) -> float:
        pairs = [(law.x_for(loss), other.x_for(loss)) for loss in at]
        if any(math.isinf(mine) for mine, _ in pairs):
            return math.inf  # it needs more than there is
        if any(math.isinf(its) for _, its in pairs):
            return 0.0
        return math.exp(statistics.fmean(math.log(mine) - math.log(its) for mine, its in pairs))

    def estimate(at: Sequence[float]) -> Estimate:
        pairs = zip(found.resampled, base.resampled, strict=False)
        return _estimate(ratio(found.law, base.law, at), [ratio(*pair, at) for pair in pairs])

    return Multiplier(group, baseline, best, worst, estimate(losses), estimate(losses[-1:]))


def isoflop_minima(runs: Sequence[ScalingRun]) -> Iterator[IsoFlop]:
    """For each group and budget with three sizes or more the best size (arXiv 2203.15556, section 3.2)."""
    import numpy as np

    for group in dict.fromkeys(run.group for run in runs):
        for budget in _budgets([run for run in runs if run.group == group]):
            sizes = np.log([run.parameters for run in budget])
            count, flops = len(set(sizes)), statistics.geometric_mean(run.train_flops for run in budget)
            if count < 3:
                continue
            middle = sizes.mean()
            bend, slope, level = np.polyfit(sizes - middle, [run.loss for run in budget], 2)
            lowest = -slope / (2 * bend) + middle if bend > 0 else math.inf
            places = _evenly(sizes.min() - middle, sizes.max() - middle)
            drawn = [(math.exp(at + middle), float(bend * at**2 + slope * at + level)) for at in places]
            best, loss = None, None
            if sizes.min() <= lowest <= sizes.max():
                best, loss = math.exp(lowest), float(level - slope**2 / (4 * bend))
            points = tuple((run.parameters, run.loss) for run in budget)
            yield IsoFlop(group, flops, count, best, loss, points, tuple(drawn))


def _budgets(runs: Sequence[ScalingRun]) -> Iterator[list[ScalingRun]]:
    """Those that spent the same, the smallest budget first."""
    budget: list[ScalingRun] = []
    for run in sorted(runs, key=lambda run: run.train_flops):
        if budget and run.train_flops > SAME_BUDGET * budget[0].train_flops:
            yield budget
            budget = []
        budget.append(run)
    if budget:
        yield budget
