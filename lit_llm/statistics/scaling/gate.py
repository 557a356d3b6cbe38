"""The gate of a scaling ladder: is a change worth its compute and its time at each size, and at the compute to come?

The compute multiplier of a size is the training FLOPs at which the baseline's law has the loss of that size, over the
FLOPs that the size took. Above 1 the change saves compute. The wall-clock multiplier uses measured seconds of training
in place of FLOPs, and the baseline's law in seconds. Over the sizes, a straight line in log compute is fitted to the
logarithm of each multiplier. Its slope shows whether an advantage grows or fades, and the line extrapolates to a
compute that was not run.

Three 95% intervals:

- size: other seeds of this size, and other sizes and seeds of the baseline's law;
- slope: other sizes and seeds of both;
- projection (a prediction interval): one more size of each, run at that compute. It holds if the law and the line
  continue beyond the data, which no interval can show.

Losses before the end of a schedule's decay do not follow such a law, so only runs whose schedules have ended count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from lit_llm.statistics.estimates import Estimate, estimate, exponentials, holds, joined
from lit_llm.statistics.scaling.comparison import draws_for
from lit_llm.statistics.scaling.group_fit import GroupFit, fit_sizes
from lit_llm.statistics.scaling.runs import ScalingRun, lost_notes, sizes_by_group
from lit_llm.statistics.scaling.size_means import (
    Size,
    luck_draws,
    means_of,
    model_draws,
    seconds_variance,
    seed_variance,
    size_weights,
)
from lit_llm.statistics.verdicts import LOST

GateScale = Literal["train_flops", "seconds"]
Verdict = Literal["passes", "fails", "undecided", "undecided: lost runs"]
LINE = 2
"""Number of parameters of a straight line."""


@dataclass(frozen=True)
class GateSize:
    """One size of a group against the baseline's law."""

    name: str
    train_flops: float
    loss: float
    """Geometric mean over the seeds of the size."""
    seeds: int
    multiplier: Estimate
    """Above 1 where the baseline needs more for this loss."""
    extrapolated: bool
    """Whether the loss is outside the range of the baseline's sizes."""


@dataclass(frozen=True)
class Trend:
    """The multipliers of one group in one scale, over its sizes."""

    group: str
    scale: GateScale
    sizes: tuple[GateSize, ...]
    slope: Estimate | None
    """Slope of log multiplier over log compute: 0.1 is a multiplier that grows by 26% per tenfold compute. None with
    fewer than three sizes."""
    projection: Estimate | None
    """The multiplier at the compute that the study names, with a prediction interval."""
    difference: Estimate | None
    """Loss of the group minus that of the baseline at the projected compute, or the same time, with a prediction
    interval."""
    verdict: Verdict


@dataclass(frozen=True)
class Gate:
    """Gate of a study: the multiplier of each group against the baseline, size by size."""

    baseline: str
    metric: str
    project: float | None
    """Training FLOPs of the projection."""
    at_least: float
    """Smallest multiplier that passes."""
    trends: tuple[Trend, ...]
    notes: tuple[str, ...]


def gate(
    runs: Sequence[ScalingRun],
    metric: str,
    baseline: str,
    project: float | None = None,
    at_least: float = 1.0,
    irreducible: bool = False,
    draws: int | None = None,
    random: Any = None,
    lost: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Gate:
    """The multipliers of every group against the baseline's law, in compute and in time.

    Args:
        runs: finished runs whose schedules have ended, of all groups.
        metric: name of their loss.
        baseline: the group whose law the others are measured by.
        project: training FLOPs to project to; None for no projection.
        at_least: smallest multiplier that passes, at the projection, else at the largest size.
        irreducible: whether the baseline's law has an E.
        draws: number of draws of each law, for the intervals; that of `draws_for` when None.
        random: numpy's Generator; one with a fixed seed when None.
        lost: {group: its sizes of which runs diverged}.
    """
    import numpy as np

    random = np.random.default_rng(0) if random is None else random
    draws = draws or draws_for(runs, irreducible)
    members = sizes_by_group(runs)
    trends, notes = list[Trend](), [*lost_notes(lost)]
    for scale, what in (("train_flops", "compute"), ("seconds", "wall-clock")):
        timed = {group: [size for size in sizes if scale in size.logs] for group, sizes in members.items()}
        if lacking := [size.name for sizes in members.values() for size in sizes if scale not in size.logs]:
            notes.append(f"without measured seconds, so in no {what} multiplier: {joined(lacking)}")
        try:
            base = fit_sizes(timed.get(baseline, []), scale, irreducible, draws, random)  # type: ignore[arg-type]
        except ValueError as error:
            notes.append(f"no {what} multipliers: the law of the baseline {baseline} is not known: {error}")
            continue
        if base.law.exponent[0] <= 0:
            notes.append(
                f"the law of the baseline {baseline} does not fall with {what}: no multiplier is known, and none passes"
            )
        if base.drawn is None:
            notes.append(f"{what} multipliers have no interval: {baseline} has as many sizes as numbers to fit")
        for group, sizes in timed.items():
            if group != baseline and sizes:
                trend = _trend(group, sizes, base, scale, project, at_least, draws, random)  # type: ignore[arg-type]
                # Lost runs bend a law: at small sizes they favour one side at the projection, at large sizes the other.
                trends.append(replace(trend, verdict=LOST) if lost.keys() & {group, baseline} else trend)
    return Gate(baseline, metric, project, at_least, tuple(trends), (*notes, *_notes(trends, project)))


def _trend(
    group: str,
    sizes: Sequence[Size],
    base: GroupFit,
    scale: GateScale,
    project: float | None,
    at_least: float,
    draws: int,
    random: Any,
) -> Trend:
    import numpy as np

    means, log_x = means_of(sizes), np.array([size.logs[scale] for size in sizes])
    point = base.law.log_x(means)[0] - log_x
    drawn = None
    if base.drawn is not None and (noise := _seed_draws(sizes, base.sizes, draws, random)) is not None:
        drawn = base.drawn.shifted(base.level).log_x(means + noise) - log_x
        if scale == "seconds":
            drawn = drawn - _timing_draws([*sizes, *base.sizes], sizes, draws, random)
    base_means = means_of(base.sizes)
    rows = tuple(
        GateSize(
            size.name,
            math.exp(size.logs["train_flops"]),
            math.exp(size.mean),
            size.count,
            exponentials(estimate(float(point[at]), None if drawn is None else drawn[:, at])),
            not base_means.min() <= size.mean <= base_means.max(),
        )
        for at, size in enumerate(sizes)
    )
    line = _Line.of(sizes, base, scale, draws, random)
    slope = None if line is None else line.slope
    projection, difference = line.projected(math.log(project)) if line and project is not None else (None, None)
    judged = projection if project is not None else rows[-1].multiplier
    return Trend(group, scale, rows, slope, projection, difference, _verdict(judged, at_least))


def _verdict(judged: Estimate | None, at_least: float) -> Verdict:
    if judged is None or judged.low is None or judged.high is None or not math.isfinite(judged.value):
        return "undecided"
    if judged.low >= at_least:
        return "passes"
    return "fails" if judged.high < at_least else "undecided"


def _seed_draws(sizes: Sequence[Size], others: Sequence[Size], draws: int, random: Any) -> Any:
    """Draws of the effect of other seeds on the mean log loss of each size: draws x sizes; None without an estimate.

    The variance is that over the seeds of a size, pooled over both groups. With one seed each, it is the variance of
    the sizes about their own power law, which includes that of the seeds.
    """
    import numpy as np

    counts = np.array([size.count for size in sizes], float)
    within, degrees = seed_variance([*sizes, *others])
    if not degrees:
        degrees = len(sizes) - LINE
        if degrees < 1:
            return None
        residuals = _line_residuals(np.array([size.logs["train_flops"] for size in sizes]), means_of(sizes))
        within = float((residuals**2).sum()) / degrees
    deviations = (within * degrees / random.chisquare(degrees, draws)) ** 0.5
    return deviations[:, None] * random.normal(size=(draws, len(sizes))) / counts**0.5


def _timing_draws(pooled: Sequence[Size], sizes: Sequence[Size], draws: int, random: Any) -> Any:
    """Draws of the error of each size's mean log seconds, from the runs of one size; zero with one run each."""
    import numpy as np

    variance, degrees = seconds_variance(pooled)
    if not degrees:
        return np.zeros((draws, len(sizes)))
    counts = np.array([size.count for size in sizes], float)
    deviations = (variance * degrees / random.chisquare(degrees, draws)) ** 0.5
    return deviations[:, None] * random.normal(size=(draws, len(sizes))) / counts**0.5


def _line_residuals(x: Any, y: Any) -> Any:
    import numpy as np

    return y - np.polyval(np.polyfit(x - x.mean(), y, 1), x - x.mean())


@dataclass(frozen=True)
class _Line:
    """log multiplier = level + slope (log compute - middle): the fit, and draws of it."""

    base: GroupFit
    middle: float
    numbers: Any
    """(level, slope) of the fit."""
    drawn: Any
    """Draws of (level, slope): draws x 2; None without an interval."""
    deviations: Any
    """Draws of the deviation of one more size of the group from the line."""
    base_deviations: Any
    """Draws of the deviation of one more size of the baseline from its law, in log loss."""
    scale_line: tuple[float, float]
    """(level, slope) of the group's log x (FLOPs or seconds) over its log compute."""

    @classmethod
    def of(cls, sizes: Sequence[Size], base: GroupFit, scale: GateScale, draws: int, random: Any) -> _Line | None:
        """The line through the multipliers of these sizes; None with fewer than three sizes."""
        import numpy as np

        compute = np.array([size.logs["train_flops"] for size in sizes])
        degrees = len(sizes) - LINE
        if degrees < 1:
            return None
        means, log_x = means_of(sizes), np.array([size.logs[scale] for size in sizes])
        weights = size_weights(sizes, _line_residuals(compute, means), LINE)
        middle = float(np.average(compute, weights=weights))
        design = np.column_stack([np.ones(len(sizes)), compute - middle])
        inverse = np.linalg.inv((design * weights[:, None]).T @ design)
        project = (design * weights[:, None]) @ inverse
        numbers = (base.law.log_x(means)[0] - log_x) @ project
        across = np.polyfit(compute - middle, log_x, 1)
        scale_line = float(across[1]), float(across[0])
        if base.drawn is None:
            return cls(base, middle, numbers, None, None, None, scale_line)
        residuals = _line_residuals(compute, means)
        share = luck_draws(sizes, base.sizes, draws, random) + model_draws(sizes, residuals, draws, random)
        multipliers = base.drawn.log_x(means + (share - base.models_share)[:, None]) - log_x
        with np.errstate(invalid="ignore"):
            fitted = multipliers @ project
            squares = (weights * (multipliers - fitted @ design.T) ** 2).sum(axis=1)
        deviation = np.sqrt(squares / random.chisquare(degrees, draws))
        drawn = fitted + deviation[:, None] * (random.normal(size=(draws, LINE)) @ np.linalg.cholesky(inverse).T)
        free = len(base.sizes) - base.numbers
        base_deviations = np.sqrt((base.residuals**2).sum() / random.chisquare(free, draws)) * random.normal(size=draws)
        return cls(base, middle, numbers, drawn, deviation * random.normal(size=draws), base_deviations, scale_line)

    @property
    def slope(self) -> Estimate:
        return estimate(float(self.numbers[1]), None if self.drawn is None else self.drawn[:, 1])

    def projected(self, compute: float) -> tuple[Estimate, Estimate]:
        """(multiplier, loss minus the baseline's for the same x) at a log compute, with prediction intervals."""
        import numpy as np

        away = compute - self.middle
        log_x = self.scale_line[0] + self.scale_line[1] * away

        def at(numbers: Any) -> Any:
            return numbers[..., 0] + numbers[..., 1] * away

        middle = float(at(self.numbers))
        law = self.base.law
        point = math.exp(law.log_loss([log_x + middle])[0, 0]) - math.exp(law.log_loss([log_x])[0, 0])
        if self.drawn is None:
            return exponentials(Estimate(middle)), Estimate(point)
        drawn = self.base.drawn
        assert drawn is not None
        group = drawn.log_loss_at(log_x + at(self.drawn) + self.deviations)
        baseline = drawn.log_loss_at(np.full(len(group), log_x)) + self.base_deviations
        # Compute that the baseline needs, where one more of its sizes deviates from the law.
        multipliers = drawn.log_x((group - self.base_deviations)[:, None])[:, 0] - log_x
        return exponentials(estimate(middle, multipliers)), estimate(point, np.exp(group) - np.exp(baseline))


def _notes(trends: Sequence[Trend], project: float | None) -> Iterator[str]:
    short = list(dict.fromkeys(trend.group for trend in trends if trend.slope is None))
    if short:
        yield f"no slope and no projection with fewer than three sizes: {joined(short)}"
    beyond = list(dict.fromkeys(size.name for trend in trends for size in trend.sizes if size.extrapolated))
    if beyond:
        yield f"beyond the losses of the baseline's sizes, so by its law extrapolated: {joined(beyond)}"
    turning = [
        f"{trend.group} ({'compute' if trend.scale == 'train_flops' else 'wall-clock'})"
        for trend in trends
        if trend.slope is not None and trend.slope.low is not None and not holds(trend.slope, 0.0)
    ]
    if turning:
        yield f"the multiplier changes with compute, so none of one size carries over to another: {joined(turning)}"
    if trends:
        yield (
            "a size's interval: its other seeds, and the baseline's other sizes and seeds; the slope's: other sizes "
            "and seeds of both"
        )
    if trends and project is not None:
        yield (
            "the projection's interval is of what one more size of each would show there, if both laws go on as they "
            "are within the data"
        )
