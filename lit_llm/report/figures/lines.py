"""Figures of lines in panels: learning curves, losses by position or learning rate, costs, fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lit_llm.report.figures.style import GREY, LineStyle, legend, line_styles, panels, scale, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Places = Mapping[float, tuple[float, float]]
"""{step or another key that runs have in common: (x, y)} of one run."""


@dataclass(frozen=True)
class Line:
    """A curve, with a band where it is a mean."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Ends of the band at each x; empty for a single curve."""
    high: Sequence[float] = ()
    lost: bool = False
    """Whether the run diverged; its end is marked."""


@dataclass(frozen=True)
class Panel:
    """Content of one pair of axes."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Sequence[Line]]
    """The curves of each name; all but the first are thin: single runs."""
    log: str = ""
    """Logarithmic axes: `x`, `y` or `xy`."""
    points: Mapping[str, Sequence[tuple[float, float]]] | None = None
    """Markers without a line: measurements to which curves were fitted."""
    crosses: Mapping[str, Sequence[float]] | None = None
    """x at which runs diverged and have no y; marked at the top."""
    verticals: Sequence[float] = ()
    """x of thin lines from top to bottom."""
    ticks: Sequence[float] = ()
    """x of the ticks; matplotlib's choice when empty."""


def over_seeds(runs: Iterable[Places]) -> Line | None:
    """Mean, lowest and highest value of finished runs, at the steps that all of them have."""
    import numpy as np

    runs = [run for run in runs if run]
    common = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not common:
        return None
    x, y = np.array([[run[place] for place in common] for run in runs]).transpose(2, 0, 1)  # each runs x places
    middle = Line(x.mean(axis=0).tolist(), y.mean(axis=0).tolist())
    if len(runs) == 1:
        return middle
    return replace(middle, low=y.min(axis=0).tolist(), high=y.max(axis=0).tolist())


def single(run: Places, lost: bool = False) -> Line:
    """The curve of one run."""
    places = [run[place] for place in sorted(run)]
    return Line([x for x, _ in places], [y for _, y in places], lost=lost)


def proportion(panels: Sequence[Panel], others: Sequence[Panel]) -> float | None:
    """The c for which every x of the others is c times that of the panels, at the same y; None where there is none.

    With such a c both show the same curves in different units.
    """
    ratios = set[float]()
    for one, other in zip(panels, others, strict=False):
        for name, lines in one.lines.items():
            for line, counterpart in zip(lines, other.lines.get(name, ()), strict=False):
                if list(line.y) != list(counterpart.y):
                    return None
                ratios |= {float(f"{b / a:.9g}") for a, b in zip(line.x, counterpart.x, strict=True) if a}
    same = len(panels) == len(others) and all(
        one.lines.keys() == other.lines.keys() for one, other in zip(panels, others, strict=True)
    )
    return ratios.pop() if same and len(ratios) == 1 else None


@styled
def line_figure(title: str, contents: Sequence[Panel], height: float = 2.1, shared: bool = False) -> Figure:
    """Panels of lines with one legend; a name has one style in all of them.

    shared: whether panels with the same label of the y axis have the same range.
    """
    names = list(dict.fromkeys(name for panel in contents for name in (*panel.lines, *(panel.points or ()))))
    look = line_styles(names)
    entries = names if len(names) > 1 else []
    figure, every = panels(title, len(contents), height, named=entries)
    handles: dict[str, Any] = {}
    for axes, panel in zip(every, contents, strict=True):
        handles = _draw(axes, panel, look) | handles
    if shared:
        _share_ranges(every, [panel.ylabel for panel in contents])
    legend(figure, {name: handles[name] for name in entries})
    return figure


def _share_ranges(every: Sequence[Axes], labels: Sequence[str]) -> None:
    """Set one range of y for the axes with the same label."""
    for label in dict.fromkeys(labels):
        group = [axes for axes, ylabel in zip(every, labels, strict=True) if ylabel == label]
        low, high = (min(axes.get_ylim()[0] for axes in group), max(axes.get_ylim()[1] for axes in group))
        for axes in group:
            axes.set_ylim(low, high)


def _draw(axes: Axes, panel: Panel, look: Mapping[str, LineStyle]) -> dict[str, Any]:
    """Draw a panel. Returns {name: handle} for the legend."""
    handles: dict[str, Any] = {}
    for name, lines in panel.lines.items():
        style = look[name]
        for number, line in enumerate(lines):
            # Many markers would hide the line.
            marks: dict[str, Any] = {"marker": style.marker} if len(line.x) <= 16 and number == 0 else {}
            thin: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.8} if number else {}
            (drawn,) = axes.plot(line.x, line.y, color=style.colour, linestyle=style.dashes, **marks, **thin)
            handles.setdefault(name, drawn)
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.15, linewidth=0)
            if line.lost and line.x:
                axes.plot(line.x[-1:], line.y[-1:], color=style.colour, marker="x", linestyle="none", markersize=5)
    for name, points in (panel.points or {}).items():
        style = look[name]
        filled = "none" if len(points) > 40 else style.colour
        x, y = [x for x, _ in points], [y for _, y in points]
        (drawn,) = axes.plot(x, y, color=style.colour, marker=style.marker, linestyle="none", markerfacecolor=filled)
        handles.setdefault(name, drawn)
    for vertical in panel.verticals:
        axes.axvline(vertical, color=GREY, linewidth=0.7, linestyle=":", zorder=0.9)
    for place, (name, xs) in enumerate((panel.crosses or {}).items()):
        # At the top, each name a little lower than the one before, so that none hides another.
        if xs:
            heights, above = [1.0 - 0.045 * place] * len(xs), axes.get_xaxis_transform()
            axes.plot(xs, heights, color=look[name].colour, marker="x", linestyle="none", transform=above)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    every = [line for lines in panel.lines.values() for line in lines]
    marks_at = [place for points in (panel.points or {}).values() for place in points]
    scale(axes, "x", [x for line in every for x in line.x] + [x for x, _ in marks_at], "x" in panel.log)
    if panel.ticks:
        axes.set_xticks(panel.ticks)
        axes.minorticks_off()
    scale(axes, "y", [y for line in every for y in line.y] + [y for _, y in marks_at], "y" in panel.log)
    return handles
