"""Effects of the factors of a two-level design, whole or a fraction.

A main effect is the mean over the arms at the factor's second level minus the mean over the arms at its first level. An
interaction of two factors is half the difference between the effect of one at the second and at the first level of the
other: the mean over the arms where both or neither are switched minus the mean over the arms where one is. Every arm
takes part in every effect, so each effect is as precise as if all runs had been spent on it alone.

A seed gives one value of each effect. The interval comes from the variance of these values, moderated by that of the
other effects (`contrasts`). Only seeds for which every arm has a value count, because an incomplete sum contains other
effects too. Source: Box, Hunter and Hunter, Statistics for Experimenters, 2nd ed., chapters 5 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lit_llm.statistics.baselines import Noise, pooled_contrasts
from lit_llm.statistics.contrasts import contrast, estimates
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.paired import Difference, Values
from lit_llm.statistics.verdicts import LOST, P_VALUES, judged_alone


@dataclass(frozen=True)
class Contrast:
    """An effect to estimate."""

    name: str
    """`A` for a factor, `AB` for an interaction."""
    factors: tuple[str, ...]
    levels: tuple[str, ...]
    """Labels of the first and second level; empty for an interaction."""
    members: tuple[int, ...]
    """Positions of the factors among the levels of an arm."""
    aliases: str = ""
    """Effects that the design confounds with this one, with signs: `−BD −CE ...`."""


@dataclass(frozen=True)
class Layout:
    """Arms with balanced levels, so that effects can be estimated."""

    group: str
    arms: Mapping[str, tuple[int, ...]]
    """{arm: level of every factor}, 0 for the first and 1 for the second."""
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Effect:
    """One effect, estimated."""

    name: str
    factors: tuple[str, ...]
    levels: tuple[str, ...]
    aliases: str
    effect: Difference | None
    """None while no seed is complete."""
    p: float | None = None
    """p-value of the two-sided test of no effect, adjusted for multiple comparisons; None for one seed."""
    detectable: float | None = None
    """Smallest true effect that this number of seeds detects with 80% power."""
    verdict: str | None = None
    """The effect in words, as for an arm."""
    simple: tuple[tuple[str, Difference], ...] = ()
    """(level, effect) of an interaction's first factor at each level of its second; the intervals are not adjusted."""


@dataclass(frozen=True)
class Effects:
    """The effects of one group of arms."""

    group: str
    arms: int
    seeds: tuple[int, ...]
    """Seeds for which every arm has a value."""
    rows: tuple[Effect, ...]
    notes: tuple[str, ...]


def effects(
    layout: Layout,
    values: Mapping[str, Values],
    lacking: Mapping[tuple[str, int], str],
    noise: Noise = Noise(),
) -> Effects:
    """Estimate every contrast of a layout.

    values: {arm: {seed: value}}. lacking: {(arm, seed): why it has no value}.
    """
    seeds = sorted(set.intersection(*(set(values.get(arm, {})) for arm in layout.arms)))
    complete = {arm: {seed: values[arm][seed] for seed in seeds} for arm in layout.arms}
    half = 2 / len(layout.arms)
    samples = {
        row.name: contrast(
            {arm: half * _sign(levels, row.members) for arm, levels in layout.arms.items()}, complete, noise.influences
        )
        for row in layout.contrasts
    }
    differences = estimates(samples, noise.variance)
    if noise.variance == "pooled":
        differences = pooled_contrasts(differences, samples, list(complete.values()))
    rows = tuple(
        Effect(
            row.name,
            row.factors,
            row.levels,
            row.aliases,
            differences[row.name],
            simple=_simple(layout, row, complete, noise),
        )
        for row in layout.contrasts
    )
    notes = tuple(_notes(layout, seeds, noise, lacking))
    return Effects(layout.group, len(layout.arms), tuple(seeds), rows, notes)


def _simple(
    layout: Layout, interaction: Contrast, complete: Mapping[str, Values], noise: Noise
) -> tuple[tuple[str, Difference], ...]:
    """Effect of an interaction's first factor at each level of its second; empty for a fraction of a factorial."""
    if len(interaction.members) != 2 or interaction.aliases:
        return ()
    first, second = interaction.members
    labels = next((row.levels for row in layout.contrasts if row.members == (second,)), ())
    share = 4 / len(layout.arms)
    simple = []
    for level, label in enumerate(labels):
        weights = {
            arm: share * _sign(levels, [first]) for arm, levels in layout.arms.items() if levels[second] == level
        }
        effect = estimates({label: contrast(weights, complete, noise.influences)}, "paired")[label]
        if effect is None or effect.error is None:
            return ()
        simple.append((label, effect))
    return tuple(simple)


def judged_effects(
    every: Sequence[Effects],
    metric: str,
    correction: Correction = "none",
    margin: float | None = None,
    lost: Collection[str] = (),
) -> tuple[Effects, ...]:
    """The same effects with p-values and verdicts. The effects of all groups are one family.

    lost: groups of which a run diverged. Its seed is left out of every effect, so no effect of the group is judged.
    """
    judged = judged_alone(
        {f"{at}/{row.name}": row.effect for at, group in enumerate(every) for row in group.rows},
        metric,
        correction,
        margin,
    )
    count = sum(judgement.p is not None for judgement in judged.values())
    note = (P_VALUES[correction].format(n=count),) if count > 1 else ()
    groups = []
    for at, group in enumerate(every):
        rows = tuple(
            replace(
                row,
                effect=judgement.difference,
                p=judgement.p,
                detectable=judgement.detectable,
                verdict=LOST if group.group in lost else judgement.verdict,
            )
            if (judgement := judged.get(f"{at}/{row.name}"))
            else row
            for row in group.rows
        )
        groups.append(replace(group, rows=rows, notes=group.notes + note))
    return tuple(groups)


def _sign(levels: Sequence[int], members: Sequence[int]) -> int:
    """Product of the levels of these factors, coded -1 and +1."""
    return math.prod(2 * levels[member] - 1 for member in members)


def _notes(layout: Layout, seeds: Sequence[int], noise: Noise, lacking: Mapping[tuple[str, int], str]) -> Iterator[str]:
    for seed in dict.fromkeys(seed for arm, seed in lacking if arm in layout.arms):
        missing = [f"{arm} ({lacking[arm, seed]})" for arm in layout.arms if (arm, seed) in lacking]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield f"seed {seed} is left out, no value of {', '.join(missing[:3])}{more}"
    if not seeds:
        yield f"no effects yet: they need a seed for which all {len(layout.arms)} arms have a value"
    elif len(seeds) == 1:
        yield "one complete seed has no interval; add seeds to see how sure an effect is"
    elif noise.variance == "pooled":
        yield "intervals: one variance for all arms, which assumes that they scatter alike"
    else:
        yield "intervals: from each effect's values over the seeds"
    if any(contrast.aliases for contrast in layout.contrasts):
        yield "an effect has its aliases in it, with their signs; ... are those of three factors and more"
