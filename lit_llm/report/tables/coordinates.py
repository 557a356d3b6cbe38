"""The slopes of a coordinate check as a table."""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.statistics.coordinate_slopes import CLEAR, UNALIGNED, PartSlopes, Slope

VERDICTS = {"": "", "grows": "breaks: grows", "vanishes": "breaks: change vanishes"}


def coordinate_tables(slopes: Sequence[PartSlopes], steps: int, name: str) -> list[Table]:
    """A table for each axis, with a row for each part. name: that of the arm."""
    head = ["part", "at the start", f"after {text.several(steps, 'step')}", "of the change", "verdict"]
    notes = (
        "slope of the logarithm of the root mean square over that of the size, with its 95% interval over sizes and "
        "seeds; 0: no dependence, 1: proportional",
        f"a part breaks where the slope after the steps, or that of the change, is above {CLEAR:g}, or that of the "
        f"change below −{CLEAR:g}, and the interval excludes 0; a router's update, where its slope is so far below "
        f"−{-UNALIGNED:g}",
    )
    tables = []
    for axis in dict.fromkeys(one.axis for one in slopes):
        rows = [
            [one.part, *map(_cell, (one.first, one.last, one.change)), VERDICTS[one.verdict]]
            for one in slopes
            if one.axis == axis
        ]
        tables.append(Table(f"coordinates-{axis}", f"{name}: activations by {axis}", head, rows, len(head), notes))
    return tables


def _cell(slope: Slope | None) -> str:
    if slope is None:
        return "–"
    interval = "" if slope.half is None else f" ± {slope.half:.2f}"
    return f"{slope.value:+.2f}{interval}".replace("-", "−")


def conclusion(slopes: Sequence[PartSlopes]) -> str:
    """One sentence: which parts break, by which axis."""
    broken = [f"{one.part} {one.verdict} with {one.axis}" for one in slopes if one.verdict]
    if not broken:
        return "No part breaks."
    return f"{len(broken)} of {len(slopes)} break: {'; '.join(broken)}."
