"""Tables of a scaling gate: the multipliers of compute and time at each size, their slopes, the projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_llm.report import text
from lit_llm.report.tables.scaling import interval
from lit_llm.report.tables.table import Table
from lit_llm.statistics.scaling.gate import Gate, GateSize, Trend

SCALES = {"train_flops": "compute", "seconds": "wall-clock"}


def gate_tables(found: Gate) -> Iterator[Table]:
    """Each group as a whole, then size by size."""
    if not found.trends:
        yield Table("gate", _title(found), ["group"], [], 1, found.notes)
        return
    at = "" if found.project is None else f"at {text.short(found.project)} FLOPs"
    head = ["group", "in", "slope [95%]", *([f"multiplier {at} [95%]", f"loss {at} [95%]"] if at else []), "verdict"]
    rows = [
        [
            trend.group,
            SCALES[trend.scale],
            interval(trend.slope),
            *([interval(trend.projection), signed(trend)] if at else []),
            trend.verdict,
        ]
        for trend in found.trends
    ]
    yield Table("gate", _title(found), head, rows, len(head), found.notes, left=2)
    yield _sizes(found)


def _title(found: Gate) -> str:
    return f"gate: how many times as much {found.baseline} needs for the same {found.metric}; {found.at_least:g} passes"


def _sizes(found: Gate) -> Table:
    rows: dict[tuple[str, str], dict[str, GateSize]] = {}
    for trend in found.trends:
        for size in trend.sizes:
            rows.setdefault((trend.group, size.name), {})[trend.scale] = size
    head = ["size", "n", "training FLOPs", found.metric, *(f"{name} multiplier [95%]" for name in SCALES.values())]
    cells = []
    for (_, name), scales in rows.items():
        size = next(iter(scales.values()))
        multipliers = [interval(scales[scale].multiplier) if scale in scales else "–" for scale in SCALES]
        cells.append([name, str(size.seeds), text.short(size.train_flops), text.value(size.loss), *multipliers])
    return Table("gate-sizes", "gate: size by size", head, cells, len(head))


def signed(trend: Trend) -> str:
    """`-0.012 [-0.020, -0.004]`: the loss less the baseline's at the projected compute."""
    found = trend.difference
    if found is None or math.isnan(found.value):
        return "–"
    if found.low is None or found.high is None:
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def gate_sentences(found: Gate) -> Iterator[str]:
    """Of each group the multipliers that decide, in compute and in time, and how they change with compute."""
    for group in dict.fromkeys(trend.group for trend in found.trends):
        trends = [trend for trend in found.trends if trend.group == group]
        clauses = [f"{SCALES[trend.scale]} multiplier {_decisive(trend, found)} ({trend.verdict})" for trend in trends]
        where = "at its largest size" if found.project is None else f"projected to {text.short(found.project)} FLOPs"
        yield (
            f"gate, {group} against {found.baseline} in {found.metric}, {where}: {', '.join(clauses)}; "
            f"{found.at_least:g} passes."
        )
        turning = [f"{SCALES[trend.scale]} {interval(trend.slope)}" for trend in trends if _turns(trend)]
        if turning:
            yield f"the multiplier of {group} changes with compute, by slopes of log on log: {', '.join(turning)}."


def _decisive(trend: Trend, found: Gate) -> str:
    return interval(trend.sizes[-1].multiplier if found.project is None else trend.projection)


def _turns(trend: Trend) -> bool:
    slope = trend.slope
    return slope is not None and slope.low is not None and slope.high is not None and slope.low * slope.high > 0
