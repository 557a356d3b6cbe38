"""Printed names of arms, factors, levels and metrics, from `compare.labels` and the design."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from lit_llm.statistics.learning_rates import LearningRates, LRRow
from lit_llm.studies.design.factors import Printed, short_names
from lit_llm.studies.load import Ablation, Arm

T = TypeVar("T")

MOST_FACTORS = 6
"""Largest number of factors with a column each. A one-at-a-time design with more has two columns for the switch."""
NONE = "–"


class ArmName(str):
    """The printed name of an arm, or of arms that share some levels; `columns` splits it into cells."""

    columns: Mapping[str, str]
    """{head of a column: its cell}"""

    def __new__(cls, text: str, columns: Mapping[str, str]) -> ArmName:
        name = super().__new__(cls, text)
        name.columns = columns
        return name


@dataclass(frozen=True)
class Names:
    """The printed names of a study.

    Tables, sentences, figures and LaTeX use them. comparison.csv, runs.csv and all JSON keep the names of commands.
    """

    ablation: Ablation

    @property
    def labels(self) -> Mapping[str, str]:
        return self.ablation.study.compare.labels

    @cached_property
    def short(self) -> dict[str, str]:
        """{factor: the shortest ending of its key}"""
        return short_names(list(self.ablation.factors))

    def metric(self, name: str) -> str:
        return self.labels.get(name, name)

    def factor(self, name: str) -> str:
        """Printed name of a factor, by its key; any other name unchanged."""
        short = self.short.get(name)
        return Printed(self.labels.get(name) or self.labels.get(short or name) or short or name)

    def level(self, factor: str, label: str) -> str:
        """Printed name of a level: the label of `factor=level`, else of the level."""
        short = self.short.get(factor, factor)
        for key in (f"{factor}={label}", f"{short}={label}", label):
            if key in self.labels:
                return self.labels[key]
        return label

    def arm(self, name: str) -> str:
        """Printed name of an arm or of a group of arms; any other name unchanged."""
        return self._printed_arms.get(name, name)

    def without(self, name: str, factors: Sequence[str]) -> str:
        """Printed name of an arm, without its levels of some factors."""
        arm = self.ablation.arm(name)
        if not factors or not arm.levels or name in self.labels:
            return self.arm(name)
        return self._named(arm, [kept for kept in arm.levels if kept not in factors])

    @cached_property
    def spread(self) -> bool:
        """True where arms are printed as rows of levels. A fraction prints letters instead."""
        grid = self.ablation.study.grid
        return grid is not None and grid.design != "fractional_factorial"

    @cached_property
    def grouped(self) -> bool:
        """True where there is more than one named arm."""
        return len({arm.group for arm in self.ablation.arms}) > 1

    @cached_property
    def _printed_arms(self) -> dict[str, ArmName]:
        """Printed names of arms, of named arms, and of groups of arms that share some levels (rates, strata)."""
        printed: dict[str, ArmName] = {}
        within = self.ablation.study.compare.stratify_by
        for arm in self.ablation.arms:
            printed.setdefault(arm.group, ArmName(self.labels.get(arm.group, arm.group), {}))
        for arm in self.ablation.arms:
            printed[arm.name] = self._named(arm, list(arm.levels))
            if arm.levels and within:
                stratum = "/".join([arm.group, *(f"{self.short[name]}={arm.levels[name]}" for name in within)])
                printed.setdefault(stratum, self._named(arm, within, first=True))
            for left_out in arm.levels:
                kept = [name for name in arm.levels if name != left_out]
                printed.setdefault(self._internal(arm, kept), self._named(arm, kept))
        return printed

    def _internal(self, arm: Arm, kept: Sequence[str]) -> str:
        first = self.ablation.factors
        moved = [f"{self.short[name]}={arm.levels[name]}" for name in kept if arm.levels[name] != first[name][0]]
        return "/".join([arm.group, *moved])

    def _named(self, arm: Arm, kept: Sequence[str], first: bool = False) -> ArmName:
        """Printed name of an arm, or of the arms that agree in the kept factors. first: print first levels too."""
        group = self.labels.get(arm.group, arm.group)
        whole = len(kept) == len(arm.levels) and not first
        if whole and arm.name in self.labels:
            text = self.labels[arm.name]
        elif not (self.spread or first):
            letters = arm.name.removeprefix(arm.group).lstrip("/")
            text = f"{group} ({letters})" if letters else group
        else:
            moved = [name for name in kept if first or arm.levels[name] != self.ablation.factors[name][0]]
            words = ", ".join(f"{self.factor(name)} {self.level(name, arm.levels[name])}" for name in moved)
            # Without named arms, the group is printed only where a label names it.
            bare = not self.ablation.study.arms and arm.group not in self.labels
            text = group if not words else words if bare else f"{group} ({words})"
        return ArmName(text, self._cells(arm, kept, group) if self.spread else {"arm": text})

    @cached_property
    def strata(self) -> list[str]:
        """Factors of `compare.stratify_by`, the first columns of a table."""
        return [name for name in self.ablation.study.compare.stratify_by if name in self.ablation.factors]

    def stratum(self, arm: Arm) -> tuple[str, ...]:
        """Levels of an arm in the strata; empty for an arm outside the grid."""
        return tuple(arm.levels[name] for name in self.strata) if arm.levels else ()

    def _cells(self, arm: Arm, kept: Sequence[str], group: str) -> dict[str, str]:
        factors, grid = self.ablation.factors, self.ablation.study.grid
        assert grid is not None
        cells = {"arm": group} if self.grouped else {}
        if grid.design == "one_at_a_time" and len(factors) > MOST_FACTORS:
            moved = [name for name in kept if arm.levels[name] != factors[name][0]]
            cells["switched"] = ", ".join(map(self.factor, moved)) or NONE
            cells["to"] = ", ".join(self.level(name, arm.levels[name]) for name in moved) or NONE
            return cells
        factor_names = list(kept) if arm.levels else list(factors)
        for name in sorted(factor_names, key=lambda name: name not in self.strata):
            cells[self.factor(name)] = self.level(name, arm.levels[name]) if arm.levels else NONE
        return cells

    # --- printing -----------------------------------------------------------------------------------------------------

    def put_into(self, value: T) -> T:
        """A comparison, or a part of one, with the printed names of arms, groups, factors and levels.

        The metric keeps its name, which determines its direction; `text` prints it.
        """
        return self._put(value, "")

    def _put(self, value: Any, field: str) -> Any:
        if isinstance(value, str):
            if field in ("arm", "baseline", "group", "beaten_by", "below_at_low_x", "below_at_high_x"):
                return self.arm(value)
            return self.factor(value) if field in ("factor", "factors") else value
        if isinstance(value, tuple):
            items = tuple(self._put(item, field) for item in value)
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if not is_dataclass(value) or isinstance(value, type):
            return value
        changed = {}
        for one in fields(value):
            old = getattr(value, one.name)
            new = self._levels(value, old) if one.name == "levels" else self._put(old, one.name)
            if new is not old:
                changed[one.name] = new
        if isinstance(value, LearningRates):  # a group is named like its arm at the first level
            changed["rows"] = tuple(_without(row, self.factor(value.factor)) for row in changed["rows"])
        return replace(value, **changed) if changed else value

    def _levels(self, owner: Any, levels: Any) -> Any:
        """Printed names of levels, whose factor is a field of `owner`."""
        names = [owner.factor] if hasattr(owner, "factor") else list(getattr(owner, "factors", ()))
        if len(names) != 1 or not all(isinstance(level, str) for level in levels):
            return self._put(levels, "")
        return tuple(self.level(names[0], level) for level in levels)

    def text(self, words: str) -> str:
        """A sentence with the printed names of metrics, of factors by key, and of arms named by their levels.

        Commands and keys between backticks stay unchanged.
        """
        if self._pattern is None:
            return words
        parts = words.split("`")
        parts[::2] = [self._pattern.sub(lambda match: self._replacements[match[0]], part) for part in parts[::2]]
        return "`".join(parts)

    @cached_property
    def _replacements(self) -> dict[str, str]:
        """{name: printed name} of the names that cannot be mistaken for words of a sentence."""
        metrics = {name: label for name, label in self.labels.items() if "/" in name and "=" not in name}
        factors = {name: str(self.factor(name)) for name in self.ablation.factors if "." in name}
        arms = {name: str(printed) for name, printed in self._printed_arms.items() if "/" in name}
        names = {**factors, **metrics, **arms}
        return {name: printed for name, printed in names.items() if name != printed}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        if not self._replacements:
            return None
        names = "|".join(map(re.escape, sorted(self._replacements, key=len, reverse=True)))
        return re.compile(rf"(?<![\w./=-])(?:{names})(?![\w/=-]|\.\w)")


def _without(row: LRRow, factor: str) -> LRRow:
    """The row without the cell of a factor in its group."""
    group = row.group
    if not isinstance(group, ArmName):
        return row
    return replace(row, group=ArmName(group, {head: cell for head, cell in group.columns.items() if head != factor}))
