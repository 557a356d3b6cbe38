"""Factors with more than two levels: does any level differ, and does that depend on the other factors?

An analysis of variance of a full factorial design, with seeds as blocks. A factor's F compares the scatter of its
levels' means with the residual of the model arm + seed (the variance that is pooled elsewhere too); an interaction of
two factors is what the means of their pairs have beyond both. Designs are balanced here, so the sums of squares of all
terms add up and no order of the factors matters. Source: Montgomery, Design and Analysis of Experiments, chapter 5.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.analysis.correction import Correction
from lit_llm.analysis.paired import Difference, Values, paired_difference, pooled_variance, with_interval
from lit_llm.analysis.verdicts import ADJUST, LEVEL, P_VALUES, judged_alone, stand_in


@dataclass(frozen=True)
class FactorLayout:
    """The arms of a full factorial design."""

    group: str
    factors: Mapping[str, Sequence[str]]
    """The labels of each factor's levels."""
    arms: Mapping[str, tuple[int, ...]]
    """For each arm the level of every factor, 0 for the first."""


@dataclass(frozen=True)
class Term:
    """A factor, or the interaction of two."""

    factors: tuple[str, ...]
    degrees: int
    share: float
    """Of the sum of squares between all arms; what is of three factors and more stands in no term."""
    f: float | None
    """None where the arms do not scatter alike, so that there is no variance to compare with."""
    p: float | None
    """Adjusted for the other terms of the study as it asks."""
    verdict: str | None = None
    """`differs` where its levels do, else `undecided`: what is no larger than a margin, an F test does not tell."""


@dataclass(frozen=True)
class Level:
    """A level of a factor beside its first."""

    factor: str
    levels: tuple[str, str]
    """Labels of the first and this one."""
    difference: Difference | None
    """Mean over the arms at this level minus that over those at the first."""
    p: float | None = None
    """That there is none, adjusted for the other levels of all factors."""
    verdict: str | None = None
    """The difference in words, as for an arm."""


@dataclass(frozen=True)
class Anova:
    """The factors of one group of arms."""

    group: str
    arms: int
    seeds: tuple[int, ...]
    """Those for which every arm has a value."""
    residual_degrees: int
    terms: tuple[Term, ...]
    """Empty while no seed is complete."""
    levels: tuple[Level, ...]
    notes: tuple[str, ...]


def anova(layout: FactorLayout, values: Mapping[str, Values]) -> Anova:
    """F tests of every factor and every pair, and each level against the first. values: {arm: {seed: value}}."""
    import numpy as np
    from scipy.stats import f as fisher

    seeds = sorted(set.intersection(*(set(values.get(arm, {})) for arm in layout.arms)))
    complete = {arm: {seed: values[arm][seed] for seed in seeds} for arm in layout.arms}
    variance, residual = pooled_variance(list(complete.values())), (len(complete) - 1) * (len(seeds) - 1)
    names, terms = list(layout.factors), []
    if seeds:
        means = np.zeros([len(labels) for labels in layout.factors.values()])
        for arm, place in layout.arms.items():
            means[place] = statistics.fmean(complete[arm].values())
        total = float(((means - means.mean()) ** 2).sum())
        for members in (m for size in (1, 2) for m in itertools.combinations(range(len(names)), size)):
            effect = _effect(means, members)
            degrees = int(np.prod([means.shape[i] - 1 for i in members]))
            between = float((effect**2).sum())  # over all arms, in the unit of their means
            f = None if variance is None else len(seeds) * between / degrees / variance
            p = None if f is None else float(fisher.sf(f, degrees, residual))
            terms.append(Term(tuple(names[i] for i in members), degrees, between / total if total else 0.0, f, p))
    levels = tuple(_levels(layout, complete, variance, residual)) if seeds else ()
    notes = tuple(_notes(layout, seeds, variance is not None))
    return Anova(layout.group, len(layout.arms), tuple(seeds), residual, tuple(terms), levels, notes)


def judged_terms(
    every: Sequence[Anova], metric: str, correction: Correction = "none", margin: float | None = None
) -> tuple[Anova, ...]:
    """The same tables with what they say. All terms are one family, and so are all levels, those of all groups."""
    alone = {f"{at}/{n}": term.p for at, one in enumerate(every) for n, term in enumerate(one.terms)}
    p = ADJUST[stand_in(correction)]({key: value for key, value in alone.items() if value is not None})
    found = judged_alone(
        {f"{at}/{n}": level.difference for at, one in enumerate(every) for n, level in enumerate(one.levels)},
        metric,
        correction,
        margin,
    )
    told = (P_VALUES[correction].format(n=len(p)),) if len(p) > 1 else ()
    groups = []
    for at, one in enumerate(every):
        terms = (replace(term, **_said(p.get(f"{at}/{n}"))) for n, term in enumerate(one.terms))
        levels = (
            replace(level, p=own.p, verdict=own.verdict) if (own := found.get(f"{at}/{n}")) else level
            for n, level in enumerate(one.levels)
        )
        groups.append(replace(one, terms=tuple(terms), levels=tuple(levels), notes=one.notes + told))
    return tuple(groups)


def _said(p: float | None) -> dict[str, Any]:
    return {"p": p, "verdict": "differs" if p is not None and p < LEVEL else "undecided"}


def _effect(means: Any, members: Sequence[int]) -> Any:
    """What belongs to these factors together and to no part of them, at every arm."""
    for axis in range(means.ndim):
        average = means.mean(axis=axis, keepdims=True)
        means = means - average if axis in members else average + 0 * means
    return means


def _levels(
    layout: FactorLayout, complete: Mapping[str, Values], variance: float | None, residual: int
) -> Iterator[Level]:
    seeds = next(iter(complete.values()))
    for index, (name, labels) in enumerate(layout.factors.items()):
        at_level = [[arm for arm, at in layout.arms.items() if at[index] == level] for level in range(len(labels))]
        by_level = [{s: statistics.fmean(complete[arm][s] for arm in arms) for s in seeds} for arms in at_level]
        for label, found in zip(labels[1:], by_level[1:], strict=True):
            d = paired_difference(found, by_level[0])
            if d is not None and variance is not None:
                runs = len(layout.arms) // len(labels) * len(seeds)
                d = with_interval(d, 2 * variance / runs, residual, pooled=True)
            yield Level(name, (labels[0], label), d)


def _notes(layout: FactorLayout, seeds: Sequence[int], pooled: bool) -> Iterator[str]:
    if not seeds:
        yield f"no F tests yet: they need a seed for which all {len(layout.arms)} arms have a value"
    elif len(seeds) == 1:
        yield "one complete seed has no F test; add seeds to see what is more than their scatter"
    elif not pooled:
        yield "no F tests: the arms do not scatter alike, so they have no variance in common to be judged by"
    else:
        yield "F tests: against the residual variance of arm + seed"
    if len(layout.factors) > 2:
        yield "share: of the variation between the arms; what is left is of three factors and more"
