"""What the figures of a study are drawn from, and what all their captions say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_llm.config.metrics import direction
from lit_llm.report.figures.lines import Line, Places, over_seeds
from lit_llm.report.figures.style import short
from lit_llm.report.figures.training_curves import read_course
from lit_llm.report.paper import printed_study
from lit_llm.statistics.comparison import Comparison
from lit_llm.studies.load import Ablation
from lit_llm.studies.names import Names
from lit_llm.studies.palette import LineStyle, Series, arm_styles, panel_factors
from lit_llm.studies.runs import Run, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 24
"""Arms in a figure of lines: more could not be read."""
MOST_PANELS = 6
"""Levels of a factor that have panels."""
MOST_BANDS = 12
"""Arms that have bands: those of more would cover each other and the lines."""


class Drawn(NamedTuple):
    """A figure with what a reader has to know beside it."""

    name: str
    """Of its files, without an ending."""
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Shown:
    """What is drawn from."""

    ablation: Ablation
    runs: Sequence[Run]
    comparison: Comparison
    read: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    """Courses that are read already: arms share stages."""

    @property
    def metric(self) -> str:
        return self.comparison.metric

    @cached_property
    def names(self) -> Names:
        return printed_study(self.ablation, self.comparison).names

    @cached_property
    def _looks(self) -> dict[str, LineStyle]:
        return arm_styles(self.ablation)

    def series(self, name: str) -> str:
        """The printed name of an arm, or of a group of arms, with its look: a group looks like the first of them."""
        printed, arms = self.names.arm(name), self.ablation.arms
        if name in self._looks:
            return Series(printed, self._looks[name])
        alike = [arm.name for arm in arms if name in (arm.group, arm.experiment.model.family)]
        first = next(iter(alike), None)
        if first is None:  # a group that lacks a factor's first level
            first = next((arm.name for arm in arms if self.names.arm(arm.name) == printed), None)
        return printed if first is None else Series(printed, self._looks[first])

    def together(self, arms: Sequence[str]) -> Series:
        """Of arms of one panel whose curves are the same, without the factors that the panels are of; it looks like the
        first of them."""
        names = [self.names.without(arm, self.panel_factors) for arm in arms]
        return Series(_joined(names), self._looks[arms[0]])

    def whole(self, arms: Sequence[str]) -> Series:
        """Likewise in a panel of all arms."""
        return Series(_joined([self.names.arm(arm) for arm in arms]), self._looks[arms[0]])

    @cached_property
    def panel_factors(self) -> list[str]:
        return panel_factors(self.ablation)

    @cached_property
    def panels(self) -> dict[str, list[str]]:
        """{title: the arms that are drawn in it}; one without a title where no factor is spread over panels."""
        arms, found = {arm.name: arm for arm in self.ablation.arms}, dict[str, list[str]]()
        for name in self.named():
            levels = arms[name].levels
            title = ", ".join(
                f"{self.names.factor(one)} {self.names.level(one, levels[one])}" for one in self.panel_factors if levels
            )
            found.setdefault(title, []).append(name)
        return dict(list(found.items())[:MOST_PANELS])

    def labelled(self, metric: str) -> str:
        """A metric as the label of an axis, with its unit; by its label, which says what a reader has to know."""
        printed = self.names.metric(metric)
        return labelled(metric) if printed == metric else short(printed, 40)

    def named(self) -> list[str]:
        """The arms that are drawn as lines: all, or the baselines and then the best; in the study's order."""
        return self._named

    @cached_property
    def _named(self) -> list[str]:
        rows = self.comparison.rows
        sign = -1.0 if direction(self.metric) == "higher" else 1.0

        def rank(at: int) -> tuple[bool, bool, float, int]:
            row = rows[at]
            return row.arm != row.baseline, row.mean is None, sign * (row.mean or 0.0), at

        chosen = set(sorted(range(len(rows)), key=rank)[:MOST_LINES])
        return [row.arm for at, row in enumerate(rows) if at in chosen]

    def course(self, step: Step) -> list[dict[str, Any]]:
        file = step.stage.metrics_file
        if file not in self.read:
            self.read[file] = read_course(file)
        return self.read[file]

    @cached_property
    def of_arm(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.arm.name, []).append(run)
        return found

    def mean(self, runs: Iterable[Places]) -> Line | None:
        """Of finished runs; with a band where there are few enough arms to see it."""
        line = over_seeds(runs)
        return line if line is None or self.banded else replace(line, low=(), high=())

    @property
    def banded(self) -> bool:
        return len(self.named()) <= MOST_BANDS

    @property
    def band(self) -> str:
        """What lines and bands are, for a caption."""
        return "lines: mean over the finished seeds" + "; bands: from the lowest to the highest seed" * self.banded

    def unit(self, metric: str) -> str:
        """What stands beside a scale of colours: the metric's label, its unit, or its name."""
        printed = self.names.metric(metric)
        return short(printed, 40) if printed != metric else _unit(metric) or short(metric, 30)

    @property
    def chosen(self) -> str:
        """Said in a caption where not all arms are drawn."""
        count = len(self.comparison.rows)
        return f"; the baselines and the best of {count} arms" if count > MOST_LINES else ""

    @property
    def seeds(self) -> str:
        """`n = 3 seeds`, or `n = 2 to 3 seeds`, of the arms that have any."""
        return seeds_of([row.seeds for row in self.comparison.rows if row.seeds])


def _unit(metric: str) -> str:
    """Of the metric's values; empty where they have none."""
    return "nats per token" if any(table.endswith(("nll", "loss")) for table in metric.split("/")) else ""


def labelled(metric: str) -> str:
    """A metric as the label of an axis, short enough to stand beside it, with its unit."""
    shown, of = short(metric, 34), _unit(metric)
    between = ",\n" if len(shown) > 24 else ", "
    return f"{shown}{between}{of}" if of else shown


def seeds_of(counts: Sequence[int]) -> str:
    low, high = (min(counts), max(counts)) if counts else (0, 0)
    return f"n = {low} seed{'' if low == 1 else 's'}" if low == high else f"n = {low} to {high} seeds"


def _joined(names: Iterable[str]) -> str:
    """The first two of names that stand for one curve."""
    different = list(dict.fromkeys(names))
    return " = ".join(different[:2]) + f" and {len(different) - 2} more" * (len(different) > 2)


def alike(keys: Mapping[str, Any]) -> list[list[str]]:
    """The arms that have the same key, together."""
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return list(groups.values())
