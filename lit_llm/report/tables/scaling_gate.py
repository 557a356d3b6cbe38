"""Tables of a scaling gate: the multipliers of compute and time at each size, their slopes, the projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_llm.report import text
from lit_llm.report.tables.scaling import interval
from lit_llm.report.tables.table import Table
from lit_llm.statistics.scaling.gate import Gate, GateSize, Trend

SCALES = {"train_flops": "compute", "seconds": "wall-clock"}


def gate_tables(gate: Gate) -> Iterator[Table]:
    """Tables of each group as a whole, then of its sizes."""
    if not gate.trends:
        yield Table("gate", _title(gate), ["group"], [], 1, gate.notes)
        return
    at = "" if gate.project is None else f"at {text.short(gate.project)} FLOPs"
    head = ["group", "in", "slope [95%]", *([f"multiplier {at} [95%]", f"loss {at} [95%]"] if at else []), "verdict"]
    rows = [
        [
            trend.group,
            SCALES[trend.scale],
            interval(trend.slope),
            *([interval(trend.projection), signed(trend)] if at else []),
            trend.verdict,
        ]
        for trend in gate.trends
    ]
    yield Table("gate", _title(gate), head, rows, len(head), gate.notes, left=2)
    yield _sizes(gate)


def _title(gate: Gate) -> str:
    return f"gate: how many times as much {gate.baseline} needs for the same {gate.metric}; {gate.at_least:g} passes"


def _sizes(gate: Gate) -> Table:
    rows: dict[tuple[str, str], dict[str, GateSize]] = {}
    for trend in gate.trends:
        for size in trend.sizes:
            rows.setdefault((trend.group, size.name), {})[trend.scale] = size
    head = ["size", "n", "training FLOPs", gate.metric, *(f"{name} multiplier [95%]" for name in SCALES.values())]
    cells = []
    for (_, name), scales in rows.items():
        size = next(iter(scales.values()))
        multipliers = [interval(scales[scale].multiplier) if scale in scales else "–" for scale in SCALES]
        cells.append([name, str(size.seeds), text.short(size.train_flops), text.value(size.loss), *multipliers])
    return Table("gate-sizes", "gate: size by size", head, cells, len(head))


def signed(trend: Trend) -> str:
    """`-0.012 [-0.020, -0.004]`: loss minus the baseline's at the projected compute."""
    d = trend.difference
    if d is None or math.isnan(d.value):
        return "–"
    if d.low is None or d.high is None:
        return f"{d.value:+.3f}"
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def gate_sentences(gate: Gate) -> Iterator[str]:
    """Sentences on each group: decisive multipliers in compute and in time, and their change with compute."""
    for group in dict.fromkeys(trend.group for trend in gate.trends):
        trends = [trend for trend in gate.trends if trend.group == group]
        clauses = [f"{SCALES[trend.scale]} multiplier {_decisive(trend, gate)} ({trend.verdict})" for trend in trends]
        where = "at its largest size" if gate.project is None else f"projected to {text.short(gate.project)} FLOPs"
        yield (
            f"gate, {group} against {gate.baseline} in {gate.metric}, {where}: {', '.join(clauses)}; "
            f"{gate.at_least:g} passes."
        )
        changing = [f"{SCALES[trend.scale]} {interval(trend.slope)}" for trend in trends if _changes(trend)]
        if changing:
            yield f"the multiplier of {group} changes with compute, by slopes of log on log: {', '.join(changing)}."


def _decisive(trend: Trend, gate: Gate) -> str:
    return interval(trend.sizes[-1].multiplier if gate.project is None else trend.projection)


def _changes(trend: Trend) -> bool:
    slope = trend.slope
    return slope is not None and slope.low is not None and slope.high is not None and slope.low * slope.high > 0
