"""Data of a study's figures, and the common clauses of their captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_llm.config.metrics import direction
from lit_llm.report.figures.lines import Line, Places, over_seeds
from lit_llm.report.figures.style import short
from lit_llm.report.figures.training_curves import read_curve
from lit_llm.report.paper import printed_study
from lit_llm.statistics.comparison import Comparison
from lit_llm.studies.load import Ablation
from lit_llm.studies.names import Names
from lit_llm.studies.palette import LineStyle, Series, arm_styles, panel_factors
from lit_llm.studies.runs import Run, StoredStage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 24
"""Largest number of arms in a figure of lines: more is illegible."""
MOST_PANELS = 6
"""Largest number of levels of a factor that have panels."""
MOST_BANDS = 12
"""Largest number of arms with bands: more would cover each other and the lines."""


class Drawn(NamedTuple):
    """A figure with its caption."""

    name: str
    """Name of its files, without an ending."""
    caption: str
    figure: Figure


@dataclass(frozen=True)
class FigureData:
    """A study with its runs and its comparison, from which figures are drawn."""

    ablation: Ablation
    runs: Sequence[Run]
    comparison: Comparison
    read: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    """{file: training curve} of those already read, since arms share stages."""

    @property
    def metric(self) -> str:
        return self.comparison.metric

    @cached_property
    def names(self) -> Names:
        return printed_study(self.ablation, self.comparison).names

    @cached_property
    def _styles(self) -> dict[str, LineStyle]:
        return arm_styles(self.ablation)

    def series(self, name: str) -> str:
        """Printed name and style of an arm, or of a group of arms, which has the style of its first arm."""
        printed, arms = self.names.arm(name), self.ablation.arms
        if name in self._styles:
            return Series(printed, self._styles[name])
        members = [arm.name for arm in arms if name in (arm.group, arm.experiment.model.family)]
        first = next(iter(members), None)
        if first is None:  # a group that lacks a factor's first level
            first = next((arm.name for arm in arms if self.names.arm(arm.name) == printed), None)
        return printed if first is None else Series(printed, self._styles[first])

    def panel_series(self, arms: Sequence[str]) -> Series:
        """Series of arms of one panel with the same curve: names without the panels' factors, style of the first."""
        names = [self.names.without(arm, self.panel_factors) for arm in arms]
        return Series(_joined(names), self._styles[arms[0]])

    def merged_series(self, arms: Sequence[str]) -> Series:
        """Series of arms with the same curve in a panel of all arms: full names, style of the first."""
        return Series(_joined([self.names.arm(arm) for arm in arms]), self._styles[arms[0]])

    @cached_property
    def panel_factors(self) -> list[str]:
        return panel_factors(self.ablation)

    @cached_property
    def panels(self) -> dict[str, list[str]]:
        """{title: arms of the panel}; one without a title where no factor has panels."""
        arms, panels = {arm.name: arm for arm in self.ablation.arms}, dict[str, list[str]]()
        for name in self.named():
            levels = arms[name].levels
            title = ", ".join(
                f"{self.names.factor(one)} {self.names.level(one, levels[one])}" for one in self.panel_factors if levels
            )
            panels.setdefault(title, []).append(name)
        return dict(list(panels.items())[:MOST_PANELS])

    def labelled(self, metric: str) -> str:
        """A metric as the label of an axis: its printed name, else its key with the unit."""
        printed = self.names.metric(metric)
        return labelled(metric) if printed == metric else short(printed, 40)

    def named(self) -> list[str]:
        """The arms drawn as lines: all, or the baselines and then the best; in the study's order."""
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

    def curve(self, step: StoredStage) -> list[dict[str, Any]]:
        file = step.stage.metrics_file
        if file not in self.read:
            self.read[file] = read_curve(file)
        return self.read[file]

    @cached_property
    def runs_by_arm(self) -> dict[str, list[Run]]:
        by_arm: dict[str, list[Run]] = {}
        for run in self.runs:
            by_arm.setdefault(run.arm.name, []).append(run)
        return by_arm

    def mean(self, runs: Iterable[Places]) -> Line | None:
        """Mean line of finished runs, with a band where there are few enough arms."""
        line = over_seeds(runs)
        return line if line is None or self.banded else replace(line, low=(), high=())

    @property
    def banded(self) -> bool:
        return len(self.named()) <= MOST_BANDS

    @property
    def band(self) -> str:
        """Clause of a caption on lines and bands."""
        return "lines: mean over the finished seeds" + "; bands: from the lowest to the highest seed" * self.banded

    def unit(self, metric: str) -> str:
        """Label of a scale of colours: the metric's printed name, its unit, or its key."""
        printed = self.names.metric(metric)
        return short(printed, 40) if printed != metric else _unit(metric) or short(metric, 30)

    @property
    def chosen(self) -> str:
        """Clause of a caption where not all arms are drawn."""
        count = len(self.comparison.rows)
        return f"; the baselines and the best of {count} arms" if count > MOST_LINES else ""

    @property
    def seeds(self) -> str:
        """`n = 3 seeds`, or `n = 2 to 3 seeds`, of the arms that have any."""
        return seeds_of([row.seeds for row in self.comparison.rows if row.seeds])


def _unit(metric: str) -> str:
    """Unit of a metric; empty where it has none."""
    return "nats per token" if any(table.endswith(("nll", "loss")) for table in metric.split("/")) else ""


def labelled(metric: str) -> str:
    """A metric as the label of an axis, shortened, with its unit."""
    name, unit = short(metric, 34), _unit(metric)
    between = ",\n" if len(name) > 24 else ", "
    return f"{name}{between}{unit}" if unit else name


def seeds_of(counts: Sequence[int]) -> str:
    low, high = (min(counts), max(counts)) if counts else (0, 0)
    return f"n = {low} seed{'' if low == 1 else 's'}" if low == high else f"n = {low} to {high} seeds"


def _joined(names: Iterable[str]) -> str:
    """The first two names of a curve, and the number of others."""
    different = list(dict.fromkeys(names))
    return " = ".join(different[:2]) + f" and {len(different) - 2} more" * (len(different) > 2)


def group_equal(keys: Mapping[str, Any]) -> list[list[str]]:
    """Names grouped by equal keys."""
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return list(groups.values())
