"""The figure of a scaling gate: multipliers of compute and of time over training FLOPs, and their projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_llm.report import text
from lit_llm.report.figures.inputs import MOST_LINES, Drawn, FigureData
from lit_llm.report.figures.lines import Line, Panel, line_figure
from lit_llm.report.figures.style import GREY, line_styles
from lit_llm.report.tables.scaling_gate import SCALES
from lit_llm.statistics.estimates import Estimate
from lit_llm.statistics.scaling.gate import Gate, Trend


def gates(study: FigureData) -> Iterator[Drawn]:
    """Multipliers over training FLOPs: a panel for compute and one for wall-clock time, a line for each group."""
    gate = study.comparison.gate
    if gate is None or not gate.trends:
        return
    groups = list(dict.fromkeys(trend.group for trend in gate.trends))[:MOST_LINES]
    panels, panel_trends = [], []
    for scale, name in SCALES.items():
        trends = [trend for trend in gate.trends if trend.scale == scale and trend.group in groups]
        if trends:
            lines = {trend.group: [_line(trend)] for trend in trends}
            panels.append(
                Panel("", "training FLOPs", f"{name} multiplier", lines, log="xy", points=_projected(gate, trends))
            )
            panel_trends.append(trends)
    figure = line_figure(f"{gate.metric}: multipliers over {gate.baseline}", panels, height=2.4)
    look = line_styles(groups)
    for axes, trends in zip(figure.axes, panel_trends, strict=True):
        axes.axhline(gate.at_least, color=GREY, linewidth=0.8, linestyle=":", zorder=0.9)
        for trend in trends:
            ends = _ends(trend.projection)
            if gate.project is not None and ends:
                axes.plot([gate.project] * 2, ends, color=look[trend.group].colour, linewidth=0.9)
    ahead = f"; at {text.short(gate.project)} FLOPs: predicted, with 95%" if gate.project is not None else ""
    yield Drawn(
        "gate",
        f"How many times as much {gate.baseline} needs for the {gate.metric} of each size; bands: 95% over seeds "
        f"and the baseline's law{ahead}; dotted: {gate.at_least:g}, which passes.",
        figure,
    )


def _line(trend: Trend) -> Line:
    x = [size.train_flops for size in trend.sizes]
    y = [size.multiplier.value for size in trend.sizes]
    low, high = ([getattr(size.multiplier, end) for size in trend.sizes] for end in ("low", "high"))
    banded = all(_finite(*pair) for pair in zip(low, high, strict=True))
    return Line(x, y, low, high) if banded else Line(x, y)


def _projected(gate: Gate, trends: list[Trend]) -> dict[str, list[tuple[float, float]]]:
    """{group: its projected point}"""
    return {
        trend.group: [(gate.project, trend.projection.value)]
        for trend in trends
        if gate.project is not None and trend.projection is not None and _finite(trend.projection.value)
    }


def _ends(estimate: Estimate | None) -> list[float]:
    """Both ends of an interval if they can be drawn, else none."""
    if estimate is None or estimate.low is None or estimate.high is None or not _finite(estimate.low, estimate.high):
        return []
    return [estimate.low, estimate.high]


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) and value > 0 for value in values)
