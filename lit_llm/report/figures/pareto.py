"""Figures of quality against cost: fronts, scaling fits and isoFLOP profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llm.config.metrics import direction
from lit_llm.report.figures.lines import Line, Panel, line_figure
from lit_llm.report.figures.style import BLACK, GREY, legend, line_styles, panels, scale, short, styled
from lit_llm.statistics.pareto import ParetoFront

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {
    "train_flops": "training FLOPs",
    "inference_flops": "inference FLOPs",
    "training_seconds": "measured seconds of training",
    "kv_cache_bytes": "key-value cache, bytes",
    "parameters": "parameters",
    "non_embedding_parameters": "non-embedding parameters",
    "active_parameters": "parameters that one token uses",
}


@styled
def front_figure(
    title: str,
    fronts: Sequence[ParetoFront],
    deviations: Mapping[str, float | None],
    named: Sequence[str],
    metric: str = "",
) -> Figure:
    """The arms by cost and quality, one panel for each cost; a staircase joins the Pareto front.

    deviations: {arm: standard deviation over its seeds}; named: arms with an entry in the legend, the others are grey;
    metric: printed name of the metric, its key when empty.
    """
    look = line_styles(named)
    figure, every = panels(title, len(fronts), 2.3, named=named)
    handles = {}
    for axes, front in zip(every, fronts, strict=True):
        best = [point for point in front.points if point.beaten_by is None]
        axes.step([p.cost for p in best], [p.value for p in best], where="post", color=GREY, linewidth=0.8, zorder=1)
        for point in sorted(front.points, key=lambda point: point.arm in look):
            style = look.get(point.arm)
            colour, marker = (style.colour, style.marker) if style else ("#c4c4c4", ".")
            face = colour if point.beaten_by is None else "white"
            if (deviation := deviations.get(point.arm)) is not None:
                ends = [point.value - deviation, point.value + deviation]
                axes.plot([point.cost, point.cost], ends, color=colour, linewidth=0.7)
            (drawn,) = axes.plot(
                [point.cost],
                [point.value],
                color=colour,
                marker=marker,
                markerfacecolor=face,
                markersize=4.5,
                linestyle="none",
            )
            if style:
                handles[point.arm] = drawn
        axes.set_xlabel(COSTS[front.figure])
        axes.set_ylabel(f"{short(metric or front.metric, 34)}\n{direction(front.metric)} is better")
        scale(axes, "x", [point.cost for point in front.points], True)
        scale(axes, "y", [], False)
    legend(figure, {name: _filled(handles[name]) for name in named if name in handles})
    return figure


def _filled(drawn: object) -> object:
    """The marker for the legend, filled whether its arm is on the front or not."""
    import copy

    handle = copy.copy(drawn)
    handle.set_markerfacecolor(handle.get_color())  # type: ignore[attr-defined]
    return handle


Points = Sequence[tuple[float, float]]


def scaling_figure(
    title: str,
    points: Mapping[str, Mapping[str, Points]],
    fitted: Mapping[str, Mapping[str, Line]],
    ylabel: str,
    crossings: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Losses over scales (FLOPs, tokens, parameters), a panel for each, with fitted curves.

    points, fitted: {label of the panel: {family: points or curve}}; a family may have no fit. crossings: {label of the
    panel: x where curves cross}, marked by vertical lines.
    """
    panels = [
        Panel(
            "",
            label,
            ylabel,
            {name: [line] for name, line in fitted.get(label, {}).items()},
            log="xy",
            points=families,
            verticals=(crossings or {}).get(label, ()),
        )
        for label, families in points.items()
    ]
    return line_figure(title, panels, height=2.6)


@dataclass(frozen=True)
class Profile:
    """Models of several sizes that spent the same FLOPs."""

    budget: str
    """Name of the budget."""
    points: Points
    """(parameters, loss)"""
    fitted: Points
    optimum: tuple[float, float] | None = None
    """Minimum of the fitted curve, where it lies between the sizes."""


def isoflop_figure(
    title: str,
    profiles: Mapping[str, Sequence[Profile]],
    xlabel: str = "parameters",
    ylabel: str = "loss, nats per token",
) -> Figure:
    """Losses over model size at equal training FLOPs: a panel for each family, a profile for each budget, a star at its
    optimum (Hoffmann et al. 2022, arXiv 2203.15556, figure 3)."""
    panels = [
        Panel(
            name,
            xlabel,
            ylabel,
            {one.budget: [Line([x for x, _ in one.fitted], [y for _, y in one.fitted])] for one in group},
            log="x",
            points={one.budget: one.points for one in group},
        )
        for name, group in profiles.items()
    ]
    figure = line_figure(title, panels, height=2.6)
    for axes, group in zip(figure.axes, profiles.values(), strict=True):
        for x, y in (one.optimum for one in group if one.optimum):
            axes.plot([x], [y], color=BLACK, marker="*", markersize=7, linestyle="none", zorder=3)
    return figure
