"""Factors with more than two levels: does any level differ, and does that depend on the other factors?

An analysis of variance of a full factorial design with seeds as subjects. A seed gives one value of every contrast of a
term's levels, and the term's F compares their mean with their scatter over the seeds: the interaction of that term with
the seed, not a residual that all arms share, since a family of models may react to a seed in ways of its own. The
contrasts of one term may have different variances, so its degrees of freedom are Greenhouse's and Geisser's (1959,
Psychometrika 24). Designs are balanced here, so the sums of squares of all terms add up and no order of the factors
matters. Source: Winer, Statistical Principles in Experimental Design, chapter 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.statistics.baselines import Noise, pooled_contrasts
from lit_llm.statistics.contrasts import Sample, contrast, estimates
from lit_llm.statistics.document_noise import Influences, small_sample
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.paired import Difference, Values
from lit_llm.statistics.verdicts import ADJUST, LEVEL, LOST, P_VALUES, judged_alone, stand_in


@dataclass(frozen=True)
class FactorLayout:
    """The arms of a full factorial design."""

    group: str
    factors: Mapping[str, Sequence[str]]
    """The labels of each factor's levels."""
    arms: Mapping[str, tuple[int, ...]]
    """{arm: level of every factor}, 0 for the first."""


@dataclass(frozen=True)
class Term:
    """A factor, or the interaction of two."""

    factors: tuple[str, ...]
    degrees: int
    share: float
    """Share of the sum of squares between all arms; interactions of three factors and more are in no term."""
    f: float | None
    """None for one complete seed."""
    p: float | None
    """p-value of the test that all contrasts are zero, adjusted for the other terms as the study asks."""
    verdict: str | None = None
    """`differs` or `undecided`; an F test does not show that a difference is within a margin."""
    error_degrees: float = 0.0
    """Degrees of freedom of the denominator, before Greenhouse's and Geisser's factor."""
    sphericity: float = 1.0
    """Greenhouse's and Geisser's factor of both degrees of freedom; 1: all contrasts have the same variance."""


@dataclass(frozen=True)
class Level:
    """A level of a factor, compared with the first level."""

    factor: str
    levels: tuple[str, str]
    """Labels of the first and this one."""
    difference: Difference | None
    """Mean over the arms at this level minus that over those at the first."""
    p: float | None = None
    """p-value of the test of no difference, adjusted for the other levels of all factors."""
    verdict: str | None = None
    """The difference in words, as for an arm."""


@dataclass(frozen=True)
class Anova:
    """The factors of one group of arms."""

    group: str
    arms: int
    seeds: tuple[int, ...]
    """Seeds for which every arm has a value."""
    terms: tuple[Term, ...]
    """Empty while no seed is complete."""
    levels: tuple[Level, ...]
    notes: tuple[str, ...]


def anova(layout: FactorLayout, values: Mapping[str, Values], noise: Noise = Noise()) -> Anova:
    """F tests of every factor and every pair, and each level against the first. values: {arm: {seed: value}}."""
    seeds = sorted(set.intersection(*(set(values.get(arm, {})) for arm in layout.arms)))
    complete = {arm: {seed: values[arm][seed] for seed in seeds} for arm in layout.arms}
    terms = tuple(_terms(layout, complete, seeds, noise.influences)) if seeds else ()
    levels = tuple(_levels(layout, complete, noise)) if seeds else ()
    notes = tuple(_notes(layout, seeds))
    return Anova(layout.group, len(layout.arms), tuple(seeds), terms, levels, notes)


def _terms(
    layout: FactorLayout, complete: Mapping[str, Values], seeds: Sequence[int], influences: Influences
) -> Iterator[Term]:
    import numpy as np

    names, shape = list(layout.factors), [len(labels) for labels in layout.factors.values()]
    table: Any = np.zeros([len(seeds), *shape])
    for arm, place in layout.arms.items():
        table[(slice(None), *place)] = [complete[arm][seed] for seed in seeds]
    documents = _documents(layout, seeds, shape, influences)
    means = table.mean(axis=0)
    total = float(((means - means.mean()) ** 2).sum())
    for members in (m for size in (1, 2) for m in itertools.combinations(range(len(names)), size)):
        degrees = int(np.prod([shape[i] - 1 for i in members]))
        effects = np.stack([_effect(one, members) for one in table]).reshape(len(seeds), -1)
        parts, factor, free = documents or (np.zeros((0, *shape)), 0.0, 1.0)
        by_document = np.reshape([_effect(one, members) for one in parts], (len(parts), effects.shape[1]))
        tested = _f_test(effects, degrees, math.sqrt(factor) * by_document, free)
        between = float((effects.mean(axis=0) ** 2).sum())  # over all arms, in the unit of their means
        share = between / total if total else 0.0
        yield replace(tested, factors=tuple(names[i] for i in members), share=share)


def _documents(
    layout: FactorLayout, seeds: Sequence[int], shape: Sequence[int], influences: Influences
) -> tuple[Any, float, float] | None:
    """(influence of each document on each arm, documents x levels; factor and degrees of freedom of the variance)."""
    import numpy as np

    cells = {arm: [influences.get((arm, seed)) for seed in seeds] for arm in layout.arms}
    recorded = [part for parts in cells.values() for part in parts if part is not None]
    if len(recorded) < len(seeds) * len(cells) or len({part.names for part in recorded}) != 1:
        return None
    added: Any = np.zeros([len(recorded[0].shares), *shape])
    for arm, place in layout.arms.items():
        added[(slice(None), *place)] = sum(part.values for part in cells[arm] if part is not None) / len(seeds)
    return added, *small_sample(sum(part.shares for part in recorded) / len(recorded))


def _f_test(effects: Any, degrees: int, by_document: Any, free: float) -> Term:
    """F test of a term by Box's approximation (1954, Ann. Math. Stat. 25).

    Over seeds alone it is Greenhouse's and Geisser's. Of the test over seeds and the test over seeds and documents, the
    one with the larger p is returned.

    effects: seeds x arms, the effect of the term alone; by_document: the same for each document, scaled so that the sum
    of squares is the variance over documents, which has `free` degrees of freedom.
    """
    import numpy as np
    from scipy.stats import f as fisher

    seeds = len(effects)
    if seeds < 2:
        return Term((), degrees, 0.0, None, None)
    mean = effects.mean(axis=0)
    by_seed = (effects - mean) / math.sqrt(seeds * (seeds - 1))
    if not by_seed.any():
        return Term((), degrees, 0.0, None, None)
    tests = []
    for rows in (by_seed, np.concatenate([by_seed, by_document])) if len(by_document) else (by_seed,):
        # V = R'R is the covariance of the mean effects; tr V and tr V² come from the rows, which may be few.
        trace, square = float((rows**2).sum()), float(((rows @ rows.T) ** 2).sum())
        sphericity = min(1.0, max(1 / degrees, trace**2 / (degrees * square)))
        parts = ((by_seed, seeds - 1.0), *[(by_document, free)] * (rows is not by_seed))
        below = sum(float(((part @ part.T) ** 2).sum()) / df for part, df in parts)
        f, error = float((mean**2).sum()) / trace, trace**2 / below
        p = float(fisher.sf(f, sphericity * degrees, error))
        tests.append(Term((), degrees, 0.0, f, p, error_degrees=error / sphericity, sphericity=sphericity))
    return max(tests, key=lambda term: term.p or 0.0)


def judged_terms(
    every: Sequence[Anova],
    metric: str,
    correction: Correction = "none",
    margin: float | None = None,
    lost: Collection[str] = (),
) -> tuple[Anova, ...]:
    """The same tables with p-values and verdicts. The terms of all groups are one family, and so are all levels.

    lost: groups of which a run diverged; they are not judged.
    """
    alone = {f"{at}/{n}": term.p for at, one in enumerate(every) for n, term in enumerate(one.terms)}
    p = ADJUST[stand_in(correction)]({key: value for key, value in alone.items() if value is not None})
    judged = judged_alone(
        {f"{at}/{n}": level.difference for at, one in enumerate(every) for n, level in enumerate(one.levels)},
        metric,
        correction,
        margin,
    )
    note = (P_VALUES[correction].format(n=len(p)),) if len(p) > 1 else ()
    groups = []
    for at, one in enumerate(every):
        terms = (
            replace(term, **_p_and_verdict(p.get(f"{at}/{n}"), one.group in lost)) for n, term in enumerate(one.terms)
        )
        levels = (
            replace(level, difference=each.difference, p=each.p, verdict=LOST if one.group in lost else each.verdict)
            if (each := judged.get(f"{at}/{n}"))
            else level
            for n, level in enumerate(one.levels)
        )
        groups.append(replace(one, terms=tuple(terms), levels=tuple(levels), notes=one.notes + note))
    return tuple(groups)


def _p_and_verdict(p: float | None, lost: bool) -> dict[str, Any]:
    return {"p": p, "verdict": LOST if lost else "differs" if p is not None and p < LEVEL else "undecided"}


def _effect(means: Any, members: Sequence[int]) -> Any:
    """Interaction of exactly these factors, without effects of subsets of them, for every arm."""
    for axis in range(means.ndim):
        average = means.mean(axis=axis, keepdims=True)
        means = means - average if axis in members else average + 0 * means
    return means


def _levels(layout: FactorLayout, complete: Mapping[str, Values], noise: Noise) -> Iterator[Level]:
    samples: dict[tuple[str, int], Sample] = {}
    for index, (name, labels) in enumerate(layout.factors.items()):
        share = len(labels) / len(layout.arms)
        for level in range(1, len(labels)):
            weights = {
                arm: share if at[index] == level else -share
                for arm, at in layout.arms.items()
                if at[index] in (0, level)
            }
            samples[name, level] = contrast(weights, complete, noise.influences)
    named = {f"{name}/{level}": sample for (name, level), sample in samples.items()}
    differences = estimates(named, noise.variance)
    if noise.variance == "pooled":
        differences = pooled_contrasts(differences, named, list(complete.values()))
    for name, level in samples:
        labels = layout.factors[name]
        yield Level(name, (labels[0], labels[level]), differences[f"{name}/{level}"])


def _notes(layout: FactorLayout, seeds: Sequence[int]) -> Iterator[str]:
    if not seeds:
        yield f"no F tests yet: they need a seed for which all {len(layout.arms)} arms have a value"
    elif len(seeds) == 1:
        yield "one complete seed has no F test; add seeds to see what is more than their scatter"
    else:
        yield "F tests: each term against its scatter over the seeds, Greenhouse and Geisser's degrees of freedom"
    if len(layout.factors) > 2:
        yield "share: of the variation between the arms; what is left is of three factors and more"
