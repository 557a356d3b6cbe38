"""Effects that a design can estimate, aliases of a fraction, and arms that differ only in the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lit_llm.statistics.anova import FactorLayout
from lit_llm.statistics.effects import Contrast, Layout
from lit_llm.statistics.learning_rates import LRFactor, LRGroup
from lit_llm.studies.design.factors import short_names
from lit_llm.studies.fractional_factorial import (
    LETTERS,
    Fraction,
    aliases_in_letters,
    by_size,
    effect_of,
    lettered,
    members_of,
    sign,
)
from lit_llm.studies.load import Ablation, Arm


def layouts(ablation: Ablation) -> list[Layout]:
    """Layouts of two-level effects: one for each named arm in the grid and each level of `compare.stratify_by`.

    Empty for other designs, for factors of more levels, and where combinations are excluded.
    """
    grid, within = ablation.study.grid, ablation.study.compare.stratify_by
    if grid is None or grid.design not in ("factorial", "fractional_factorial") or grid.exclude:
        return []
    factors = {name: labels for name, labels in ablation.factors.items() if name not in within}
    if not 2 <= len(factors) <= len(LETTERS) or any(len(labels) != 2 for labels in factors.values()):
        return []
    contrasts = _contrasts(ablation, factors)
    return [Layout(group, arms, contrasts) for group, arms in _arms_by_level(ablation, factors).items()]


def factor_layouts(ablation: Ablation) -> list[FactorLayout]:
    """Layouts of full factorials with a factor of more than two levels; empty for other designs."""
    grid, within = ablation.study.grid, ablation.study.compare.stratify_by
    factors = {name: labels for name, labels in ablation.factors.items() if name not in within}
    if grid is None or grid.design != "factorial" or grid.exclude or all(len(x) == 2 for x in factors.values()):
        return []
    return [FactorLayout(group, factors, arms) for group, arms in _arms_by_level(ablation, factors).items()]


def _arms_by_level(ablation: Ablation, factors: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """{group: {arm: index of its level of each factor}}"""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    short, within = short_names(list(ablation.factors)), ablation.study.compare.stratify_by
    for arm in ablation.arms:
        if arm.levels:
            group = "/".join([arm.group, *(f"{short[name]}={arm.levels[name]}" for name in within)])
            levels = tuple(labels.index(arm.levels[name]) for name, labels in factors.items())
            groups.setdefault(group, {})[arm.name] = levels
    return groups


def _contrasts(ablation: Ablation, factors: Mapping[str, Sequence[str]]) -> tuple[Contrast, ...]:
    """Main effects, then interactions: the requested ones in a fraction, else all pairs."""
    grid, names = ablation.study.grid, list(factors)
    assert grid is not None
    fraction = grid.fraction
    every = _main_and_pairs(len(names))
    contrasts = []
    for effect in (*every[: len(names)], *grid.requested) if fraction else every:
        members = tuple(members_of(effect))
        levels = tuple(factors[names[effect.bit_length() - 1]]) if len(members) == 1 else ()
        aliases = aliases_in_letters(fraction, effect) if fraction else ""
        contrasts.append(Contrast(lettered(effect), tuple(names[i] for i in members), levels, members, aliases))
    return tuple(contrasts)


LEARNING_RATES = (".optimizer.lr", ".optimizer.adamw.lr")
"""Endings of keys that are learning rates; the second is that of Muon's AdamW."""


def lr_factors(ablation: Ablation) -> list[LRFactor]:
    """Factors that are learning rates, each with its groups of two arms or more.

    A group is named by what its arms have in common, and compared with the group of their baselines.
    """
    grid, factors = ablation.study.grid, []
    short, first = short_names(list(ablation.factors)), {name: labels[0] for name, labels in ablation.factors.items()}
    for factor, levels in grid.factors.items() if grid else ():
        if not factor.endswith(LEARNING_RATES) or not isinstance(levels, tuple):
            continue
        groups: dict[str, list[Arm]] = {}
        names: dict[str, str] = {}
        for arm in ablation.arms:
            others = {name: label for name, label in arm.levels.items() if name != factor and label != first[name]}
            name = "/".join([arm.group, *(f"{short[other]}={label}" for other, label in others.items())])
            if factor in arm.levels:
                groups.setdefault(name, []).append(arm)
                names[arm.name] = name
        several = {name: arms for name, arms in groups.items() if len(arms) > 1}
        if several:
            lr_groups = [
                LRGroup(
                    name,
                    names.get(arms[0].baseline, arms[0].baseline),
                    {arm.name: _value(arm, factor) for arm in arms},
                )
                for name, arms in several.items()
            ]
            factors.append(LRFactor(factor, tuple(lr_groups)))
    return factors


def _value(arm: Arm, key: str) -> Any:
    value: Any = arm.experiment
    for part in key.split("."):
        value = getattr(value, part)
    return value


def design_json(ablation: Ablation) -> dict[str, Any] | None:
    """The design of the grid as plain data: factors, levels and the aliases of a fraction.

    `aliases` holds every main effect and every two-factor interaction, each with its aliases of up to two factors and,
    as `further`, the number of the others. An estimate is the sum of an effect and its aliases, with their signs.
    """
    grid, factors = ablation.study.grid, ablation.factors
    if grid is None:
        return None
    design: dict[str, Any] = {"kind": grid.design, "factors": factors}
    if fraction := grid.fraction:
        names = list(factors)

        def named(effect: int) -> list[str]:
            return [names[i] for i in members_of(effect)]

        aliases = []
        for effect in _main_and_pairs(len(names)):
            short = [alias for alias in fraction.aliases(effect) if alias.bit_count() <= 2]
            aliases.append(
                {
                    "effect": named(effect),
                    "requested": effect in grid.requested,
                    "aliases": [{"effect": named(alias), "sign": sign(effect, alias)} for alias in short],
                    "further": len(fraction.words) - len(short),
                }
            )
        design |= {
            "combinations": fraction.size,
            "of": 1 << len(names),
            "resolution": fraction.resolution,
            "generators": [{"word": named(word), "sign": sign(word, 0)} for word in fraction.generators],
            "interactions": [named(effect) for effect in grid.requested],
            "aliases": aliases,
        }
    return design


def chains(fraction: Fraction) -> list[list[int]]:
    """Two-factor interactions that share one estimate with each other, and with no main effect."""
    confounded = []
    for effect in _main_and_pairs(len(fraction.columns))[len(fraction.columns) :]:
        short = [alias for alias in (effect, *fraction.aliases(effect)) if alias.bit_count() <= 2]
        if len(short) > 1 and effect == min(short, key=by_size):
            confounded.append(short)
    return confounded


def _main_and_pairs(factors: int) -> list[int]:
    pairs = itertools.combinations(range(factors), 2)
    return [*(effect_of(i) for i in range(factors)), *(effect_of(*pair) for pair in pairs)]
