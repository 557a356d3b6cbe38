"""Differences as pictures: a forest of effects, a ladder rung by rung, before against after, two factors at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.analysis.paired import Difference
from lit_llm.report import text
from lit_llm.report.figures.style import (
    BLACK,
    BLUE,
    GREY,
    PAGE,
    PANEL,
    ROW,
    VERMILLION,
    legend,
    looks,
    panels,
    scale,
    short,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Verdict = Literal["better", "worse", "differs", "undecided", "one seed"]
VERDICTS: dict[Verdict, tuple[str, str, bool]] = {
    "better": (BLUE, "v", True),
    "worse": (VERMILLION, "^", True),
    "differs": (BLACK, "D", True),
    "undecided": (GREY, "o", False),
    "one seed": (GREY, "x", True),
}
"""(colour, marker, whether it is filled) of each."""
MEANINGS: dict[Verdict, str] = {
    "better": "better: the interval excludes 0",
    "worse": "worse: the interval excludes 0",
    "differs": "differs: the interval excludes 0",
    "undecided": "the interval holds 0",
    "one seed": "one seed: no interval",
}


def verdict(difference: Difference, better: Literal["lower", "higher"] | None) -> Verdict:
    """What an interval says; `differs` where neither way is better."""
    if difference.low is None or difference.high is None:
        return "one seed"
    if difference.low <= 0 <= difference.high:
        return "undecided"
    if better is None:
        return "differs"
    return "better" if (difference.mean < 0) == (better == "lower") else "worse"


@dataclass(frozen=True)
class Named:
    """A difference with its name."""

    name: str
    difference: Difference


@styled
def forest(
    title: str,
    groups: Mapping[str, Sequence[Named]],
    xlabel: str,
    better: Literal["lower", "higher"] | None,
    ylabel: str = "arm",
) -> Figure:
    """Differences with their intervals, one below the other, group by group; the marker is the verdict."""
    count = sum(map(len, groups.values())) + sum(name != "" for name in groups)
    used = [v for v in VERDICTS if any(verdict(n.difference, better) == v for rows in groups.values() for n in rows)]
    wide = max(len(row.name) for rows in groups.values() for row in rows) > 40
    names = [MEANINGS[found] for found in used]
    figure, (axes,) = panels(title, 1, max(0.9, 0.45 + ROW * count), named=names, wide=wide)
    axes.axvline(0, color=BLACK, linewidth=0.7)
    labels: list[tuple[str, bool]] = []
    for group, rows in groups.items():
        if group:
            labels.append((group, True))
        for row in rows:
            _interval(axes, row.difference, len(labels), better)
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
    legend(figure, {MEANINGS[v]: _marker(v) for v in used})
    return figure


def _interval(axes: Axes, difference: Difference, at: float, better: Literal["lower", "higher"] | None) -> None:
    colour, marker, filled = VERDICTS[verdict(difference, better)]
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [at, at], color=colour, linewidth=1.1)
    face = colour if filled else "white"
    axes.plot([difference.mean], [at], color=colour, marker=marker, markerfacecolor=face, markersize=4.2)


def _marker(found: Verdict) -> Any:
    from matplotlib.lines import Line2D

    colour, marker, filled = VERDICTS[found]
    face = colour if filled else "white"
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, markersize=4.2, linewidth=1.1)


@dataclass(frozen=True)
class Ladder:
    """Arms, each compared with the one before it."""

    start: str
    mean: float
    """Of the first one."""
    rungs: tuple[Named, ...]

    @property
    def ends(self) -> list[float]:
        """Where the first arm stands, and each rung's end: the differences, added up."""
        found = [self.mean]
        for rung in self.rungs:
            found.append(found[-1] + rung.difference.mean)
        return found


@styled
def waterfall(title: str, ladders: Sequence[Ladder], xlabel: str, better: Literal["lower", "higher"] | None) -> Figure:
    """Each rung a bar from where the one before it ends, with the interval of its difference around its own end."""
    most = max(len(ladder.rungs) for ladder in ladders) + 1
    used = [v for v in VERDICTS if any(verdict(r.difference, better) == v for one in ladders for r in one.rungs)]
    names = [MEANINGS[found] for found in used]
    figure, every = panels(title, len(ladders), 0.55 + 1.25 * ROW * most, columns=1, named=names)
    low, high = math.inf, -math.inf
    for axes, ladder in zip(every, ladders, strict=True):
        ends = ladder.ends
        axes.plot([ends[0], ends[0]], [-0.35, 1.35], color=BLACK, linewidth=1.1)
        for at, (rung, begin, end) in enumerate(zip(ladder.rungs, ends, ends[1:], strict=False), start=1):
            found = verdict(rung.difference, better)
            colour, _, filled = VERDICTS[found]
            axes.barh(at, end - begin, 0.62, left=begin, color=colour if filled else "white", edgecolor=colour)
            if at < len(ladder.rungs):
                axes.plot([end, end], [at - 0.31, at + 1.31], color=GREY, linewidth=0.6)
            d = rung.difference
            if d.low is not None and d.high is not None:
                axes.plot([begin + d.low, begin + d.high], [at, at], color=BLACK, linewidth=0.9)
        arms = [ladder.start, *(rung.name for rung in ladder.rungs)]
        axes.set_yticks(range(len(arms)), [short(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylabel("rung")
        low, high = min(low, axes.get_xlim()[0]), max(high, axes.get_xlim()[1])
    for axes in every:
        axes.set_xlim(low, high)
        scale(axes, "x", [], False)
    every[-1].set_xlabel(xlabel)
    from matplotlib.patches import Patch

    bars = {v: VERDICTS[v] for v in used}
    legend(figure, {MEANINGS[v]: Patch(facecolor=c if f else "white", edgecolor=c) for v, (c, _, f) in bars.items()})
    return figure


@styled
def slopes(title: str, arms: Mapping[str, tuple[Difference, Difference]], ylabel: str) -> Figure:
    """Each arm's difference from its baseline before and after finetuning, joined by a line: they cross where the order
    turns."""
    look = looks(["", *arms])  # black is the baseline's, here the line at zero
    figure, (axes,) = panels(title, 1, 2.8, named=arms)
    axes.axhline(0, color=BLACK, linewidth=0.9)
    handles = {}
    for place, (name, pair) in enumerate(arms.items()):
        shift = 0.012 * (place - (len(arms) - 1) / 2)  # so that intervals do not cover each other
        mine = look[name]
        x = [shift, 1 + shift]
        for at, d in zip(x, pair, strict=True):
            if d.low is not None and d.high is not None:
                axes.plot([at, at], [d.low, d.high], color=mine.colour, linewidth=0.7)
        means = [d.mean for d in pair]
        (handles[name],) = axes.plot(x, means, color=mine.colour, linestyle=mine.dashes, marker=mine.marker)
    axes.set_xticks([0, 1], ["after pretraining", "after finetuning"])
    axes.set_xlim(-0.25, 1.25)
    axes.set_xlabel("when it was evaluated")
    axes.set_ylabel(ylabel)
    scale(axes, "y", [], False)
    legend(figure, handles)
    return figure


@dataclass(frozen=True)
class Crossed:
    """Two factors: of every combination of their levels the mean, None where nothing is finished."""

    rows: str
    columns: str
    row_levels: tuple[str, ...]
    column_levels: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]
    """One tuple for each level of `rows`."""
    lost: tuple[tuple[int, ...], ...]
    """Runs that diverged, likewise."""


@styled
def heat_map(title: str, crossed: Sequence[Crossed], metric: str) -> Figure:
    """A field for each combination: its colour and its number are the mean, `†1` a run that diverged."""
    cells = max(len(one.row_levels) for one in crossed)
    names = max((len(short(level, 24)) for one in crossed for level in one.column_levels), default=1)
    widest = max(len(one.column_levels) for one in crossed)
    across = 1 if widest > 6 else 2
    width = (PAGE / across if len(crossed) > 1 and across > 1 else PANEL) - 1.6
    steep = 0.062 * names > width / widest
    figure, every = panels(title, len(crossed), 0.75 + 0.26 * cells + 0.05 * names * steep, across)
    known = [mean for one in crossed for row in one.means for mean in row if mean is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    image = None
    for axes, one in zip(every, crossed, strict=True):
        numbers = [[math.nan if mean is None else mean for mean in row] for row in one.means]
        image = axes.imshow(numbers, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for i, (row, lost) in enumerate(zip(one.means, one.lost, strict=True)):
            for j, (mean, diverged) in enumerate(zip(row, lost, strict=True)):
                told = [text.value(mean)] * (mean is not None) + [f"†{diverged}"] * bool(diverged)
                dark = mean is not None and mean < (low + high) / 2
                colour = "white" if dark else "black"
                axes.text(j, i, "\n".join(told) or "–", ha="center", va="center", color=colour, fontsize=6)
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
        bar = figure.colorbar(image, ax=every, label=metric, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
    return figure
