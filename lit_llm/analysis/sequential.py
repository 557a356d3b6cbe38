"""Seeds in rounds: go on only where the difference is not decided yet, without more false alarms for the looking.

Whoever looks at 5% after every round finds a difference that is not there far more often than in one of twenty studies.
Here the 5% are spent over the looks (`lit_llm.analysis.spending`). With several arms under one family-wise level, each
arm has its equal share of the 5% (Bonferroni), spent over its looks: valid whatever the arms have in common.

A difference that stopped the rounds early is too large on average. The bias-adjusted estimate beside it is unbiased
over all ways in which the looks can end (Emerson and Fleming 1990, Biometrika 77).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lit_llm.analysis.baselines import Noise, block_differences
from lit_llm.analysis.correction import two_sided_p
from lit_llm.analysis.paired import Values
from lit_llm.analysis.spending import PastLooks, Rounds, chain, pocock_spending
from lit_llm.analysis.verdicts import LEVEL, Judgement, Levels, judgements

__all__ = ["PastLooks", "Rounds", "Standing", "pocock_spending", "round_levels", "standings"]

OPEN = ("undecided", "not enough seeds")
"""Verdicts that decide nothing: without a margin, and with one."""


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
    differences: tuple[float, ...] = ()
    """From the baseline, seed by seed, as that look saw them."""


def standings(
    values: Mapping[str, Values],
    baseline: str,
    metric: str,
    seeds: Sequence[int],
    rounds: Rounds,
    margin: float | None = None,
    lost: Mapping[str, set[int]] | None = None,
    comparisons: int = 1,
    noise: Noise = Noise(),
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
        judged = judgements(block_differences(block, baseline, noise), baselines, metric, margin=margin, levels=usable)
        following = next((more for more in rounds.sizes if more > size), size)
        for arm in open_arms:
            judgement = judged.get(arm)
            if judgement is not None and not levels.difference:
                judgement = replace(judgement, verdict=OPEN[0] if margin is None else OPEN[1])
            decided = judgement is not None and judgement.verdict not in OPEN
            if judgement is not None and judgement.p is not None:
                judgement = replace(judgement, p=stagewise_p(judgement.p, look, rounds, comparisons))
            differences = tuple(v - block[baseline][s] for s, v in block[arm].items() if s in block[baseline])
            more = size if decided else following
            found[arm] = Standing(size, judgement, decided, more, look, differences if judgement else ())
        open_arms = [arm for arm in open_arms if not found[arm].decided]
    most = max((standing.more for standing in found.values()), default=rounds.sizes[0])
    found[baseline] = Standing(max((s.seeds for s in found.values()), default=0), None, False, most)
    return found


def round_levels(rounds: Rounds, comparisons: float = 1) -> tuple[Levels, ...]:
    """The levels of each look: of the two-sided test for a difference, of each one-sided one of equivalence.

    comparisons: arms that share the 5%.
    """
    two_sided = chain(rounds, LEVEL / comparisons).levels
    one_sided = chain(rounds, 2 * LEVEL / comparisons).levels
    return tuple(Levels(two, one / 2) for two, one in zip(two_sided, one_sided, strict=True))


def stagewise_p(raw: float, look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """p-value of a difference that the looks up to this one have led to, adjusted for the arms that share the 5%.

    It counts the looks before (`Chain.p`) and is below 5% exactly where the look's own level is passed.

    Args:
        raw: two-sided p-value of the look's own test.
        look: counted from zero.
    """
    return min(1.0, comparisons * chain(rounds, LEVEL / comparisons).p(look, raw))


def bias_adjusted(standings: Mapping[str, Standing], rounds: Rounds, comparisons: int = 1) -> dict[str, float]:
    """Differences without the bias of the looks, of the arms that were looked at more than once, in the metric's unit.

    A difference that is decided at the first look has none to take away, and one of which a run was lost is left out.
    """
    found = {}
    for arm, standing in standings.items():
        d = standing.differences
        if standing.look and len(d) == standing.seeds:
            found[arm] = unbiased(d, standing.look, rounds, comparisons)
    return found


def unbiased(differences: Sequence[float], look: int, rounds: Rounds, comparisons: int = 1) -> float:
    """Emerson's and Fleming's estimate of a mean that was last looked at with these differences, in their unit."""
    seeds = len(differences)
    root = math.sqrt(sum(d * d for d in differences))
    mean = math.fsum(differences) / seeds
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (seeds - 1))
    p = two_sided_p(mean / spread * math.sqrt(seeds), seeds - 1) if spread else float(not mean)
    return math.copysign(chain(rounds, LEVEL / comparisons).unbiased(look, p, root), mean)
