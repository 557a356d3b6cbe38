"""Figures of differences: forest plots, stepwise comparisons, before and after, heat maps of two factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_llm.report import text
from lit_llm.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PAGE,
    PANEL,
    ROW,
    VERMILION,
    legend,
    line_styles,
    panels,
    scale,
    short,
    styled,
)
from lit_llm.statistics.paired import Difference
from lit_llm.statistics.verdicts import LOST, UNDECIDED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_JUDGED = "not judged"
"""In place of a verdict, for estimates without a test."""
VERDICTS: dict[str, tuple[str, bool]] = {
    "better": (BLUE, True),
    "worse": (VERMILION, True),
    "lower": (BLACK, True),
    "higher": (BLACK, True),
    "undecided": (GREY, False),
    "not enough seeds": (GREY, False),
    NOT_JUDGED: (GREY, False),
    LOST: (GREY, False),
}
"""{verdict: (colour, whether the marker is filled)}"""
WIDE = 30
"""Largest number of letters of a name in a figure of one column."""
WITHIN_MARGIN = (GREEN, True)
"""(colour, filled) of `no difference larger than 0.02`."""


@dataclass(frozen=True)
class Named:
    """A difference with its name and verdict."""

    name: str
    difference: Difference
    verdict: str

    @property
    def marker(self) -> str:
        """A triangle in the direction of a significant difference; a circle where undecided."""
        if self.verdict in (*UNDECIDED, NOT_JUDGED):
            return "o"
        return "s" if self.verdict not in VERDICTS else "v" if self.difference.mean < 0 else "^"

    @property
    def sign(self) -> str:
        """The marker as a letter; empty where undecided."""
        return {"v": "▼", "^": "▲", "s": "■", "o": ""}[self.marker]

    @property
    def colours(self) -> tuple[str, str]:
        """(colour, face colour)."""
        colour, filled = VERDICTS.get(self.verdict, WITHIN_MARGIN)
        return colour, colour if filled else "white"


def _first_of_each_verdict(rows: Iterable[Named]) -> dict[str, Named]:
    """{verdict: the first row that has it}, in the order of VERDICTS."""
    by_verdict: dict[str, Named] = {}
    for row in rows:
        by_verdict.setdefault(row.verdict, row)
    order = list(VERDICTS)
    return dict(sorted(by_verdict.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


@styled
def forest(
    title: str,
    groups: Mapping[str, Sequence[Named]],
    xlabel: str,
    ylabel: str = "arm",
) -> Figure:
    """Differences with their intervals, one below the other, group by group; the marker is the verdict."""
    count = sum(map(len, groups.values())) + sum(name != "" for name in groups)
    used = _first_of_each_verdict(row for rows in groups.values() for row in rows)
    wide = max(len(row.name) for rows in groups.values() for row in rows) > WIDE
    figure, (axes,) = panels(title, 1, max(0.9, 0.45 + ROW * count), named=used, wide=wide)
    axes.axvline(0, color=BLACK, linewidth=0.7)
    labels: list[tuple[str, bool]] = []
    for group, rows in groups.items():
        if group:
            labels.append((group, True))
        for row in rows:
            _interval(axes, row, len(labels))
            labels.append((row.name, False))
    axes.set_yticks(range(len(labels)), [short(name) for name, _ in labels])
    for tick, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if heading else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    scale(axes, "x", [], False)
    legend(figure, {verdict: _marker(row) for verdict, row in used.items()})
    return figure


def _interval(axes: Axes, row: Named, at: float) -> None:
    d, (colour, face) = row.difference, row.colours
    if d.low is not None and d.high is not None:
        axes.plot([d.low, d.high], [at, at], color=colour, linewidth=1.1)
    if d.documents and d.seeds_low is not None and d.seeds_high is not None:
        axes.plot([d.seeds_low, d.seeds_high], [at, at], color=colour, linewidth=2.8, solid_capstyle="butt")
    axes.plot([d.mean], [at], color=colour, marker=row.marker, markerfacecolor=face, markersize=4.2)


def _marker(row: Named) -> Any:
    from matplotlib.lines import Line2D

    colour, face = row.colours
    return Line2D([], [], color=colour, marker=row.marker, markerfacecolor=face, markersize=4.2, linewidth=1.1)


@dataclass(frozen=True)
class Stepwise:
    """Arms, each compared with the one before it."""

    start: str
    mean: float
    """Mean of the first arm."""
    steps: tuple[Named, ...]

    @property
    def ends(self) -> list[float]:
        """Mean of the first arm, then the end of each step: cumulative sums of the differences."""
        ends = [self.mean]
        for step in self.steps:
            ends.append(ends[-1] + step.difference.mean)
        return ends


@styled
def waterfall(title: str, stepwise_comparisons: Sequence[Stepwise], xlabel: str) -> Figure:
    """A bar for each step, from the end of the step before, with the interval of its difference at its end."""
    most = max(len(comparison.steps) for comparison in stepwise_comparisons) + 1
    used = _first_of_each_verdict(step for one in stepwise_comparisons for step in one.steps)
    wide = any(
        len(name) > WIDE for one in stepwise_comparisons for name in (one.start, *(step.name for step in one.steps))
    )
    figure, every = panels(title, len(stepwise_comparisons), 0.55 + 1.25 * ROW * most, columns=1, named=used, wide=wide)
    low, high = math.inf, -math.inf
    for axes, comparison in zip(every, stepwise_comparisons, strict=True):
        ends, axes.use_sticky_edges = comparison.ends, False  # else the axes end at the line of the first arm
        axes.plot([ends[0], ends[0]], [-0.35, 1.35], color=BLACK, linewidth=1.1)
        for at, (step, begin, end) in enumerate(zip(comparison.steps, ends, ends[1:], strict=False), start=1):
            edge, face = step.colours
            axes.barh(at, end - begin, 0.62, left=begin, color=face, edgecolor=edge)
            if at < len(comparison.steps):
                axes.plot([end, end], [at - 0.31, at + 1.31], color=GREY, linewidth=0.6)
            d = step.difference
            if d.low is not None and d.high is not None:
                axes.plot([begin + d.low, begin + d.high], [at, at], color=BLACK, linewidth=0.9)
        arms = [comparison.start, *(step.name for step in comparison.steps)]
        axes.set_yticks(range(len(arms)), [short(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylabel("step")
        low, high = min(low, axes.get_xlim()[0]), max(high, axes.get_xlim()[1])
    for axes in every:
        axes.set_xlim(low, high)
        scale(axes, "x", [], False)
    every[-1].set_xlabel(xlabel)
    from matplotlib.patches import Patch

    colours = {verdict: step.colours for verdict, step in used.items()}
    legend(figure, {name: Patch(facecolor=face, edgecolor=edge) for name, (edge, face) in colours.items()})
    return figure


class End(NamedTuple):
    """An end of a line of `slopes`."""

    value: float
    low: float | None
    high: float | None
    """Ends of the error bar; None for no bar."""


@styled
def slopes(
    title: str,
    arms: Mapping[str, tuple[End, End]],
    ylabel: str,
    ends: tuple[str, str],
    xlabel: str,
    from_zero: bool = True,
) -> Figure:
    """A line for each arm from before to after; lines cross where the order changes.

    ends: names of the two times; from_zero: whether values are differences from a baseline, drawn as a black line at
    zero.
    """
    look = line_styles(["", *arms] if from_zero else arms)
    figure, (axes,) = panels(title, 1, 2.8, named=arms)
    if from_zero:
        axes.axhline(0, color=BLACK, linewidth=0.9)
    handles = {}
    for place, (name, pair) in enumerate(arms.items()):
        shift = 0.012 * (place - (len(arms) - 1) / 2)  # so that intervals do not cover each other
        style = look[name]
        x = [shift, 1 + shift]
        for at, end in zip(x, pair, strict=True):
            if end.low is not None and end.high is not None:
                axes.plot([at, at], [end.low, end.high], color=style.colour, linewidth=0.7)
        values = [end.value for end in pair]
        (handles[name],) = axes.plot(x, values, color=style.colour, linestyle=style.dashes, marker=style.marker)
    axes.set_xticks([0, 1], list(ends))
    axes.set_xlim(-0.25, 1.25)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    scale(axes, "y", [], False)
    legend(figure, handles)
    return figure


@dataclass(frozen=True)
class Crossed:
    """Means for every combination of the levels of two factors; None where no run is finished."""

    rows: str
    columns: str
    row_levels: tuple[str, ...]
    column_levels: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]
    """One tuple for each level of `rows`."""
    lost: tuple[tuple[int, ...], ...]
    """Number of diverged runs, in the same order."""
    signs: tuple[tuple[str, ...], ...] = ()
    """▼, ▲ or ■ for the verdict on a field's arm, in the same order; empty where undecided, or for several arms."""


@styled
def heat_map(title: str, crossed: Sequence[Crossed], label: str) -> Figure:
    """A field for each combination, with its mean as colour and number, ▼ or ▲ for the verdict, and `†1` for a diverged
    run. label: of the colours."""
    cells = max(len(one.row_levels) for one in crossed)
    names = max((len(short(level, 24)) for one in crossed for level in one.column_levels), default=1)
    widest = max(len(one.column_levels) for one in crossed)
    across = 1 if widest > 6 else 2
    width = (PAGE / across if len(crossed) > 1 and across > 1 else PANEL) - 1.6
    steep = 0.062 * names > width / widest
    figure, every = panels(title, len(crossed), 0.75 + 0.26 * cells + 0.05 * names * steep, across)
    means = [mean for one in crossed for row in one.means for mean in row if mean is not None]
    low, high = (min(means), max(means)) if means else (0.0, 1.0)
    image = None
    for axes, one in zip(every, crossed, strict=True):
        numbers = [[math.nan if mean is None else mean for mean in row] for row in one.means]
        image = axes.imshow(numbers, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for i, (row, lost) in enumerate(zip(one.means, one.lost, strict=True)):
            for j, (mean, diverged) in enumerate(zip(row, lost, strict=True)):
                lines = [text.value(mean)] * (mean is not None) + [f"†{diverged}"] * bool(diverged)
                if one.signs and one.signs[i][j]:
                    lines[0] += f" {one.signs[i][j]}"
                dark = mean is not None and mean < (low + high) / 2
                colour = "white" if dark else "black"
                axes.text(j, i, "\n".join(lines) or "–", ha="center", va="center", color=colour, fontsize=6)
        axes.set_xticks(range(len(one.column_levels)), [short(level, 24) for level in one.column_levels])
        if steep:
            axes.tick_params(axis="x", rotation=40)
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")
                tick.set_rotation_mode("anchor")
        axes.set_yticks(range(len(one.row_levels)), [short(level, 24) for level in one.row_levels])
        axes.set_xlabel(short(one.columns))
        axes.set_ylabel(short(one.rows))
        axes.grid(visible=False)
        axes.tick_params(length=0)
    if image is not None:
        bar = figure.colorbar(image, ax=every, label=label, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
    return figure
