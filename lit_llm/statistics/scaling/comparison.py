"""Scaling: how the loss falls with training FLOPs, parameters or tokens, and how many times the compute a group needs.

Each group of runs has a power law of its sizes (`laws`). In its intervals a size counts once, however many seeds it has
(`size_means`). The intervals hold within the data, if the sizes lie about the law without a trend. Two groups are
compared by the x that each needs for the same loss. Where their laws cross within the data, one number does not
summarise them: the crossing and the ratio at both ends are given too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lit_llm.statistics.estimates import Estimate, estimate, evenly, exponentials, interval, joined
from lit_llm.statistics.scaling.group_fit import GroupFit, fit_sizes
from lit_llm.statistics.scaling.isoflop import IsoFlop, isoflop_minima
from lit_llm.statistics.scaling.joint_law import JointLaw, joint_laws
from lit_llm.statistics.scaling.laws import Laws, PowerLaw
from lit_llm.statistics.scaling.runs import ScalingRun, X, lost_notes, sizes_by_group
from lit_llm.statistics.scaling.size_means import LackOfFit, luck_draws, seed_variance, shared_seeds

DRAWS, PLAIN_DRAWS = 1000, 4000
"""Draws of a law with E, and of a law without, whose draws are one matrix product. The ends of an interval then leave
out 2.5% give or take 0.5%, or 0.25%."""
FEWEST_DRAWS, MOST_NUMBERS = 400, 100_000
"""Fewest draws, and largest product of draws and sizes: for many sizes fewer laws are drawn, to take seconds."""
POINTS = 21
"""Number of x between two ends at which laws are drawn and compared."""
LACKING = 0.05
"""p of the lack-of-fit test below which the report says that a law does not hold."""


@dataclass(frozen=True)
class Curve:
    """The power law of one group."""

    group: str
    runs: int
    low: float
    """Least x of the runs."""
    high: float
    irreducible: Estimate
    exponent: Estimate
    law: PowerLaw
    scatter: float
    """Standard deviation of the runs about the curve, relative to the loss."""
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, low, high) within the data: pointwise 95% band of the curve; empty without intervals."""
    sizes: int = 0
    seed_scatter: float | None = None
    """Standard deviation of the runs of one size over its seeds, relative to the loss; None for one seed."""
    lack_of_fit: LackOfFit | None = None
    """None where it cannot be tested: one seed, or no more sizes than fitted numbers."""


@dataclass(frozen=True)
class Multiplier:
    """Ratio of the x that a group needs to the x that the baseline's group needs, for the same loss."""

    group: str
    baseline: str
    best: float
    """Lowest loss that both curves reach within their data."""
    worst: float
    """Highest loss that both curves reach within their data."""
    mean: Estimate
    """Geometric mean between the two losses, evenly in the baseline's log x."""
    at_best: Estimate
    at_worst: Estimate
    crossing: Crossing | None = None
    """Crossing of the curves within the data, which the mean alone would hide."""


@dataclass(frozen=True)
class Crossing:
    """Point where the laws of a group and of its baseline cross, within the data of both."""

    x: Estimate
    """The interval contains every x at which neither is significantly below the other, within the data."""
    loss: Estimate
    below_at_low_x: str
    """The group with the lower loss at the lower end of the data."""
    below_at_high_x: str
    shown: bool
    """Whether each is significantly below the other at its end of the data (95% at each end)."""


@dataclass(frozen=True)
class Scaling:
    """The laws of all groups of a study."""

    x: X
    metric: str
    irreducible: bool
    curves: tuple[Curve, ...]
    multipliers: tuple[Multiplier, ...]
    isoflops: tuple[IsoFlop, ...]
    notes: tuple[str, ...]
    runs: tuple[ScalingRun, ...] = ()
    """The runs that the laws are fitted to."""
    joint: tuple[JointLaw, ...] = ()
    """The law of parameters and tokens of each group whose sizes identify it."""
    lost: tuple[str, ...] = ()
    """Groups of which runs diverged."""


def scaling(
    runs: Sequence[ScalingRun],
    metric: str,
    baseline: str,
    x: X = "train_flops",
    irreducible: bool = True,
    draws: int | None = None,
    random: Any = None,
    lost: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Scaling:
    """The curve of every group, and how each compares with the baseline's.

    Args:
        runs: finished runs of all groups.
        metric: name of their loss.
        baseline: the group that the others are compared with.
        x: scale with which the loss falls.
        irreducible: whether E is fitted.
        draws: number of draws of each law, for its intervals; that of `draws_for` when None.
        random: numpy's Generator; one with a fixed seed when None.
        lost: {group: its sizes of which runs diverged}.
    """
    import numpy as np

    random = np.random.default_rng(0) if random is None else random
    draws = draws or draws_for(runs, irreducible)
    fits, notes = dict[str, GroupFit](), [*lost_notes(lost)]
    members = sizes_by_group(runs)
    for group, sizes in members.items():
        try:
            fits[group] = fit_sizes(sizes, x, irreducible, draws, random)
        except ValueError as error:
            notes.append(f"{group}: no curve yet: {error}")
    curves = tuple(_curve(group, fit, irreducible) for group, fit in fits.items())
    multipliers = []
    for group, fit in fits.items():
        if group == baseline or baseline not in fits:
            continue
        multiplier = _multiplier(group, fit, baseline, fits[baseline], random)
        if multiplier is None:
            notes.append(f"{group} and {baseline} reach no loss in common, so their {x} are not compared")
        else:
            multipliers.append(multiplier)
    notes += [*_crossing_notes(multipliers, x), *_fit_notes(curves), *_interval_notes(fits, curves)]
    joint, refused = joint_laws({group: members[group] for group in fits}, min(draws, DRAWS), random)
    return Scaling(
        x,
        metric,
        irreducible,
        curves,
        tuple(multipliers),
        tuple(isoflop_minima(runs)),
        (*notes, *refused),
        tuple(runs),
        joint,
        tuple(lost),
    )


def draws_for(runs: Sequence[ScalingRun], irreducible: bool) -> int:
    """Number of draws of each group's law, the same for all groups."""
    sizes = len({(run.group, run.arm) for run in runs})
    return max(FEWEST_DRAWS, min(DRAWS if irreducible else PLAIN_DRAWS, MOST_NUMBERS // max(1, sizes)))


# --- the law of one group -------------------------------------------------------------------------------------------


def _curve(group: str, fit: GroupFit, irreducible: bool) -> Curve:
    law, drawn = fit.law.law(0), fit.drawn
    e = estimate(law.irreducible, None if drawn is None or not irreducible else _exp(drawn.log_irreducible + fit.level))
    a = estimate(law.exponent, None if drawn is None else drawn.exponent)
    low, high = (math.exp(end) for end in fit.ends)
    runs = sum(size.count for size in fit.sizes)
    squares = sum(
        size.squares + size.count * float(residual) ** 2
        for size, residual in zip(fit.sizes, fit.residuals, strict=True)
    )
    scatter = math.sqrt(squares / (runs - fit.numbers)) if runs > fit.numbers else 0.0
    within, inner = seed_variance(fit.sizes)
    return Curve(
        group,
        runs,
        low,
        high,
        e,
        a,
        law,
        scatter,
        tuple(_band(fit)),
        len(fit.sizes),
        math.sqrt(within) if inner else None,
        fit.lack,
    )


def _exp(values: Any) -> Any:
    import numpy as np

    return np.exp(values)


def _band(fit: GroupFit) -> Iterator[tuple[float, float, float]]:
    if fit.drawn is None:
        return
    log_xs = evenly(*fit.ends, POINTS)
    lows, highs = _exp(interval(fit.drawn.log_loss(log_xs) + fit.level[:, None]))
    for log_x, low, high in zip(log_xs, lows, highs, strict=True):
        yield math.exp(log_x), float(low), float(high)


# --- two groups -----------------------------------------------------------------------------------------------------


def _multiplier(group: str, fit: GroupFit, baseline: str, base: GroupFit, random: Any) -> Multiplier | None:
    """The ratio of x of two groups; None where their curves reach no common loss within their data."""
    import numpy as np

    at_ends = [each.law.log_loss(each.ends)[0] for each in (fit, base)]
    worst, best = min(ends[0] for ends in at_ends), max(ends[1] for ends in at_ends)
    if best >= worst:
        return None
    start, end = (float(base.law.log_x(np.array([loss]))[0, 0]) for loss in (worst, best))
    losses = base.law.log_loss(evenly(start, end, POINTS))[0]
    ratios, drawn = _log_ratios(fit.law, base.law, losses)[0], None
    group_draws = None
    if fit.drawn is not None and base.drawn is not None:
        paired = luck_draws(fit.sizes, base.sizes, len(fit.level), random)
        group_draws = fit.drawn.shifted(paired + fit.models_share - base.models_share)
        drawn = _log_ratios(group_draws, base.drawn, losses)

    def ratio(at: slice) -> Estimate:
        middle = None if drawn is None else drawn[:, at].mean(axis=1)
        return exponentials(estimate(float(ratios[at].mean()), middle))

    return Multiplier(
        group,
        baseline,
        math.exp(best),
        math.exp(worst),
        ratio(slice(None)),
        ratio(slice(-1, None)),
        ratio(slice(0, 1)),
        _crossing(group, fit, baseline, base, group_draws),
    )


def _log_ratios(laws: Laws, baselines: Laws, losses: Any) -> Any:
    """log x minus the baseline's log x at each loss, rows x losses; nan where neither law has the loss."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return laws.log_x(losses) - baselines.log_x(losses)


CROSSING_POINTS = 201


def _crossing(group: str, fit: GroupFit, baseline: str, base: GroupFit, group_draws: Laws | None) -> Crossing | None:
    """Last sign change of the difference between two laws within the x of both; None where there is none.

    group_draws: draws of the group's law, luck included; None without intervals.
    """
    import numpy as np

    low, high = max(fit.ends[0], base.ends[0]), min(fit.ends[1], base.ends[1])
    if low >= high:
        return None
    places = np.linspace(low, high, CROSSING_POINTS)
    difference = (fit.law.log_loss(places) - base.law.log_loss(places))[0]
    turns = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    if not len(turns):
        return None
    at = int(turns[-1])
    share = difference[at] / (difference[at] - difference[at + 1])
    place = float(places[at] + share * (places[at + 1] - places[at]))
    loss = float(base.law.log_loss([place])[0, 0])
    names = (group, baseline) if difference[0] < 0 else (baseline, group)
    if group_draws is None or base.drawn is None:
        return Crossing(Estimate(math.exp(place)), Estimate(math.exp(loss)), *names, False)
    ends = interval(group_draws.log_loss(places) - base.drawn.log_loss(places))
    # x and losses at which a test does not reject equality: Fieller's set, cut at the ends of the data.
    open_x = places[(ends[0] <= 0) & (ends[1] >= 0)]
    losses = base.law.log_loss(places)[0]
    ratios = interval(_log_ratios(group_draws, base.drawn, losses))
    open_losses = losses[(ratios[0] <= 0) & (ratios[1] >= 0)]
    below, above = ends[1] < 0, ends[0] > 0
    ends_differ = bool((below[0] and above[-1]) or (above[0] and below[-1]))
    return Crossing(_estimate_spanning(place, open_x), _estimate_spanning(loss, open_losses), *names, ends_differ)


def _estimate_spanning(value: float, others: Any) -> Estimate:
    ends = [value, *map(float, others)]
    return exponentials(Estimate(value, min(ends), max(ends)))


# --- notes ----------------------------------------------------------------------------------------------------------


def _crossing_notes(multipliers: Sequence[Multiplier], x: X) -> Iterator[str]:
    for each in multipliers:
        if each.crossing is not None:
            undecided = "" if each.crossing.shown else " (not shown: an end of the data does not tell them apart)"
            yield (
                f"the curves of {each.group} and {each.baseline} cross within the data, at {each.crossing.x.value:.3g} "
                f"{x.replace('_', ' ').replace('train flops', 'training FLOPs')}{undecided}: one multiplier does not "
                "describe them"
            )


def _fit_notes(curves: Sequence[Curve]) -> Iterator[str]:
    lacking = [curve for curve in curves if curve.lack_of_fit is not None and curve.lack_of_fit.p < LACKING]
    for curve in lacking:
        test = curve.lack_of_fit
        assert test is not None
        inner, outer = test.degrees
        yield (
            f"{curve.group}: its sizes lie off the law by {test.deviation:.2%}, more than their seeds explain (lack of "
            f"fit: F({inner}, {outer}) = {test.f:.3g}, p = {test.p:.2g}); more sizes narrow its intervals, more seeds "
            "do not"
        )
    untested = [curve.group for curve in curves if curve.lack_of_fit is None]
    if untested:
        yield f"lack of fit is not tested without several seeds and a spare size: {joined(untested)}"


def _interval_notes(fits: dict[str, GroupFit], curves: Sequence[Curve]) -> Iterator[str]:
    if not curves:
        return
    bare = [group for group, fit in fits.items() if fit.drawn is None]
    if bare:
        numbers = next(fit.numbers for fit in fits.values() if fit.drawn is None)
        yield f"no interval with {numbers} sizes for {numbers} fitted numbers: {joined(bare)}"
    alone = [group for group, fit in fits.items() if fit.drawn is not None and len(shared_seeds(fit.sizes)) < 2]
    if alone:
        yield f"one seed: what it adds to all sizes of a group alike is in no interval: {joined(alone)}"
    if len(bare) < len(curves):
        yield (
            "intervals are of other sizes and other seeds: each size counts once, however many seeds it has; they hold "
            "within the data, if sizes lie about the law without a trend"
        )
