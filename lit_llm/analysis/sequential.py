"""Seeds in rounds: go on only where the difference is not decided yet, without more false alarms for the looking.

Whoever looks at 5% after every round finds a difference that is not there far more often than in one of twenty studies.
Here the 5% are spent over the looks (`lit_llm.analysis.spending`). With several arms under one family-wise level, each
arm has its equal share of the 5% (Bonferroni), spent over its looks: valid whatever the arms have in common. The levels
are those of normal increments and are then asked of Student's t, which is what the differences have (Jennison and
Turnbull 2000, Group Sequential Methods, section 3.8).

A difference that stopped the rounds early is too large on average. The bias-adjusted estimate beside it is the one
whose expectation, under these looks, is what was seen (Whitehead 1986, Biometrika 73).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lit_llm.analysis.paired import Values, block_differences
from lit_llm.analysis.spending import PastLooks, Rounds, Walk, bounds, pocock_spending, spent_levels
from lit_llm.analysis.verdicts import DIFFERENT, LEVEL, Judgement, Levels, judgements

__all__ = ["PastLooks", "Rounds", "Standing", "pocock_spending", "round_levels", "spent_levels", "standings"]

OPEN = ("undecided", "not enough seeds")
"""Verdicts that decide nothing: without a margin, and with one."""
FARTHEST = 37.0
"""Normal quantile that stands for a p-value of zero."""
ESTIMATE_NODES = 48
"""Of the quadrature of an estimate, which is printed with three digits."""


@dataclass(frozen=True)
class Standing:
    """Where an arm stands."""

    seeds: int
    """So many, the first of the list, have been looked at: those of the last look, or those that decided."""
    judgement: Judgement | None
    """By the level of that look; its p counts all looks up to it. None while the first round is not over."""
    decided: bool
    more: int
    """Seeds to run it with next, counted from the first of the list; `seeds` where it is done."""
    look: int = 0
    """Number of that look, counted from zero."""
    raw: float | None = None
    """p of that look alone."""


def standings(
    values: Mapping[str, Values],
    baseline: str,
    metric: str,
    seeds: Sequence[int],
    rounds: Rounds,
    margin: float | None = None,
    lost: Mapping[str, set[int]] | None = None,
    comparisons: int = 1,
) -> dict[str, Standing]:
    """Look at the arms that share a baseline, round by round, and say which need more seeds.

    values: {arm: {seed: value}} of the runs that have ended; lost: the seeds of each that ended without a value; seeds:
    in the order in which they are added, `rounds.most` or more; comparisons: arms that share the 5%, those of other
    baselines included. An arm that is decided stays so and is not looked at again; the baseline has as many seeds as
    the arm that needs most. A function of the results alone: whoever is interrupted goes on where the results stand.
    """
    if len(seeds) < rounds.most:
        raise ValueError(f"{rounds.most} seeds at most, and only {len(seeds)} are named")
    open_arms = [arm for arm in values if arm != baseline]
    found: dict[str, Standing] = {arm: Standing(0, None, False, rounds.sizes[0]) for arm in open_arms}
    ended = {arm: {*values[arm], *(lost or {}).get(arm, ())} for arm in values}
    usable = Levels()
    for look, (size, levels) in enumerate(zip(rounds.sizes, round_levels(rounds, comparisons), strict=True)):
        # A look for which nothing of the 5% is left decides nothing; it is shown with the last interval that could.
        usable = levels if levels.difference else usable
        now = set(seeds[:size])
        if not open_arms or any(not now <= ended[arm] for arm in (*open_arms, baseline)):
            break
        block = {arm: {s: v for s, v in values[arm].items() if s in now} for arm in (*open_arms, baseline)}
        baselines = dict.fromkeys(block, baseline)
        judged = judgements(block_differences(block, baseline), baselines, metric, margin=margin, levels=usable)
        following = next((more for more in rounds.sizes if more > size), size)
        for arm in open_arms:
            judgement = judged.get(arm)
            if judgement is not None and not levels.difference:
                judgement = replace(judgement, verdict=OPEN[0] if margin is None else OPEN[1])
            decided = judgement is not None and judgement.verdict not in OPEN
            raw = judgement.p if judgement is not None else None
            if judgement is not None and raw is not None:
                judgement = replace(judgement, p=stagewise_p(raw, look, rounds, comparisons))
            found[arm] = Standing(size, judgement, decided, size if decided else following, look, raw)
        open_arms = [arm for arm in open_arms if not found[arm].decided]
    most = max((standing.more for standing in found.values()), default=rounds.sizes[0])
    found[baseline] = Standing(max((s.seeds for s in found.values()), default=0), None, False, most)
    return found


def round_levels(rounds: Rounds, comparisons: float = 1) -> tuple[Levels, ...]:
    """The levels of each look: of the two-sided test for a difference, of each one-sided one of equivalence.

    comparisons: arms that share the 5%.
    """
    sizes, shares, lost = rounds.sizes, rounds.shares, rounds.lost
    two_sided = spent_levels(sizes, LEVEL / comparisons, shares, lost)
    one_sided = spent_levels(sizes, 2 * LEVEL / comparisons, shares, lost)
    return tuple(Levels(two, one / 2) for two, one in zip(two_sided, one_sided, strict=True))


def stagewise_p(raw: float, look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """p-value of a difference that the looks up to this one have led to, by the stagewise ordering.

    It is the chance, where there is no difference, of passing a bound at an earlier look or of a value as extreme at
    this one (Jennison and Turnbull 2000, section 8.4), times the arms that share the 5%. Below 5% exactly where the
    look's own level is passed.

    Args:
        raw: two-sided p-value of the look's own test.
        look: counted from zero.
    """
    size = rounds.sizes[look]
    before, walk = _null_walks(rounds, comparisons)[look]
    return min(1.0, comparisons * (before + walk.passing(_normal(raw) * math.sqrt(size))))


@lru_cache(maxsize=64)
def _null_walks(rounds: Rounds, comparisons: int) -> tuple[tuple[float, Walk], ...]:
    """At each look, where there is no difference: the chance of having passed a bound before, and the sum else."""
    sizes, level = rounds.sizes, LEVEL / comparisons
    limits = bounds(sizes, rounds.shares, level, rounds.lost)
    found, before = list[tuple[float, Walk]](), level * rounds.lost
    for at, size in enumerate(sizes):
        walk = Walk()
        for earlier, bound in zip(sizes[:at], limits, strict=False):
            walk.advance(earlier)
            walk.stay(bound)
        walk.advance(size)
        found.append((before, walk))
        before += walk.passing(limits[at])
    return tuple(found)


def bias_adjusted(standings: Mapping[str, Standing], rounds: Rounds, comparisons: int = 1) -> dict[str, float]:
    """Bias-adjusted differences of the arms that were found to differ before the most seeds, in the metric's unit."""
    return {
        arm: whitehead(standing.judgement.difference.mean, standing.raw, standing.look, rounds, comparisons)
        for arm, standing in standings.items()
        if standing.judgement is not None
        and standing.raw is not None
        and standing.judgement.verdict in DIFFERENT
        and standing.seeds < rounds.most
    }


def whitehead(mean: float, raw: float, look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """Whitehead's estimate of a difference that passed the bound of a look.

    The increments are taken as normal with the standard deviation that makes the look's p what it is.

    Args:
        mean: the difference as it was seen.
        raw: two-sided p-value of the look's own test.
        look: counted from zero.

    Returns:
        The estimate, in the unit of `mean`.
    """
    size = rounds.sizes[look]
    seen = _normal(raw) / math.sqrt(size)
    if not seen:
        return mean
    return mean * _adjusted(round(seen, 4), rounds, comparisons) / round(seen, 4)


@lru_cache(maxsize=4096)
def _adjusted(seen: float, rounds: Rounds, comparisons: int) -> float:
    """The mean of an increment, in its standard deviations, under which the estimate is expected to be `seen`."""
    from scipy.optimize import brentq

    sizes = rounds.sizes
    limits = bounds(sizes, rounds.shares, LEVEL / comparisons, rounds.lost)

    def expected(drift: float) -> float:
        walk, total = Walk(drift, ESTIMATE_NODES), 0.0
        for size, bound in zip(sizes[:-1], limits, strict=False):
            walk.advance(size)
            total += walk.mean_beyond(min(bound, 1e6)) / size
            walk.stay(bound)
        walk.advance(sizes[-1])
        return total + walk.mean() / sizes[-1]

    # Stopping exaggerates: what is expected lies at the truth or beyond it.
    return float(brentq(lambda drift: expected(drift) - seen, 0.0, seen * 1.001 + 1e-6, xtol=1e-6))


def _normal(p: float) -> float:
    """The |z| of a two-sided p-value."""
    from scipy.special import ndtri

    return min(FARTHEST, float(-ndtri(p / 2))) if p > 0 else FARTHEST
