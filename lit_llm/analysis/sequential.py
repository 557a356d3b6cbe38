"""Seeds in rounds: go on only where the difference is not decided yet, without more false alarms for the looking.

Whoever looks at 5% after every round finds a difference that is not there far more often than in one of twenty studies.
Here the 5% are spent over the looks by Lan's and DeMets' function of Pocock's kind (1983, Biometrika 70): at a share s
of the most seeds, α(s) = α ln(1 + (e − 1) s). It leaves the first looks enough to stop at; that of O'Brien and Fleming
spends next to nothing on them. The levels are those of normal increments and are then asked of
Student's t, which is what the differences have (Jennison and Turnbull 2000, Group Sequential Methods, section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_llm.analysis.baselines import block_differences
from lit_llm.analysis.paired import Values
from lit_llm.analysis.verdicts import LEVEL, Judgement, Levels, judgements


@dataclass(frozen=True)
class Standing:
    """Where an arm stands."""

    seeds: int
    """So many, the first of the list, have been looked at: those of the last look, or those that decided."""
    judgement: Judgement | None
    """By the level of that look; None while the first round is not over."""
    decided: bool
    more: int
    """Seeds to run it with next, counted from the first of the list; `seeds` where it is done."""


@dataclass(frozen=True)
class Rounds:
    """When is looked: after the first seeds, then after each further `step` of them up to the most."""

    first: int
    most: int
    step: int = 1

    def __post_init__(self) -> None:
        if not (2 <= self.first < self.most and self.step >= 1):
            raise ValueError("rounds need two first seeds or more, more of them at most, and a step of one or more")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Seeds at each look."""
        return (*range(self.first, self.most, self.step), self.most)


def standings(
    values: Mapping[str, Values],
    baseline: str,
    metric: str,
    seeds: Sequence[int],
    rounds: Rounds,
    margin: float | None = None,
    lost: Mapping[str, set[int]] | None = None,
) -> dict[str, Standing]:
    """Look at the arms that share a baseline, round by round, and say which need more seeds.

    values: {arm: {seed: value}} of the runs that have ended; lost: the seeds of each that ended without a value; seeds:
    in the order in which they are added, `rounds.most` or more. An arm that is decided stays so and is not looked at
    again; the baseline has as many seeds as the arm that needs most. A function of the results alone: whoever is
    interrupted goes on where the results stand.
    """
    if len(seeds) < rounds.most:
        raise ValueError(f"{rounds.most} seeds at most, and only {len(seeds)} are named")
    open_arms = [arm for arm in values if arm != baseline]
    found: dict[str, Standing] = {arm: Standing(0, None, False, rounds.first) for arm in open_arms}
    ended = {arm: {*values[arm], *(lost or {}).get(arm, ())} for arm in values}
    for size, levels in zip(rounds.sizes, round_levels(rounds), strict=True):
        now = set(seeds[:size])
        if not open_arms or any(not now <= ended[arm] for arm in (*open_arms, baseline)):
            break
        block = {arm: {s: v for s, v in values[arm].items() if s in now} for arm in (*open_arms, baseline)}
        baselines = dict.fromkeys(block, baseline)
        judged = judgements(block_differences(block, baseline), baselines, metric, margin=margin, levels=levels)
        following = next((more for more in rounds.sizes if more > size), size)
        for arm in open_arms:
            judgement = judged.get(arm)
            decided = judgement is not None and judgement.verdict not in ("undecided", "not enough seeds")
            found[arm] = Standing(size, judgement, decided, size if decided else following)
        open_arms = [arm for arm in open_arms if not found[arm].decided]
    most = max((standing.more for standing in found.values()), default=rounds.first)
    found[baseline] = Standing(max((s.seeds for s in found.values()), default=0), None, False, most)
    return found


def round_levels(rounds: Rounds) -> tuple[Levels, ...]:
    """The levels of each look: of the two-sided test for a difference, of each one-sided one of equivalence."""
    two_sided = spent_levels(rounds.sizes, LEVEL)
    one_sided = spent_levels(rounds.sizes, 2 * LEVEL)
    return tuple(Levels(two, one / 2) for two, one in zip(two_sided, one_sided, strict=True))


def pocock_spending(share: float, level: float) -> float:
    """How much of the level is spent when this share of the most seeds has been seen."""
    return level * math.log(1 + (math.e - 1) * share)


@lru_cache
def spent_levels(sizes: tuple[int, ...], level: float) -> tuple[float, ...]:
    """The two-sided level of each look, such that all together have this one.

    The looks' z are sums of normal increments over the root of their number. The chance of passing a bound for the
    first time is integrated from look to look over where the sum can be (Armitage, McPherson and Rowe 1969).
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import norm

    levels: list[float] = []
    spent, before = 0.0, 0
    nodes, weights = np.polynomial.legendre.leggauss(200)
    place, mass = np.zeros(1), np.ones(1)  # of the sum: where it is, and with what probability it has passed no bound
    for size in sizes:
        step = math.sqrt(size - before)
        due = pocock_spending(size / sizes[-1], level) - spent

        def passing(bound: float, place: Any = place, mass: Any = mass, step: float = step) -> float:
            return float(mass @ (norm.sf((bound - place) / step) + norm.cdf((-bound - place) / step)))

        bound = float(brentq(lambda b: passing(b) - due, 0.0, 12 * math.sqrt(size), xtol=1e-12))  # noqa: B023
        levels.append(float(2 * norm.sf(bound / math.sqrt(size))))
        inside = bound * nodes
        density = norm.pdf((inside[:, None] - place) / step) / step @ mass
        place, mass = inside, density * bound * weights
        spent, before = spent + due, size
    return tuple(levels)
