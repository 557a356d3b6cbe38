"""The figure of a coordinate check: a panel for each part, a line for each number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_llm.report import text
from lit_llm.report.figures.lines import Line, Panel, line_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_llm.runs.coordinates import Coordinate

LABELS = {"width": "d_model", "depth": "layers"}


def coordinate_figure(measured: Sequence[Coordinate], title: str) -> Figure:
    """Root mean square of each part's activations by size, mean and range over the seeds."""
    panels = []
    for axis, part in dict.fromkeys((one.axis, one.part) for one in measured):
        of_part = [one for one in measured if (one.axis, one.part) == (axis, part)]
        steps = sorted({one.step for one in of_part})
        lines = {
            f"after {text.several(step, 'step')}": [_line([one for one in of_part if one.step == step])]
            for step in steps
        }
        sizes = sorted({one.size for one in of_part})
        panels.append(Panel(part, LABELS[axis], "root mean square", lines, log="xy", ticks=sizes))
    return line_figure(title, panels, 1.6)


def _line(measured: Sequence[Coordinate]) -> Line:
    sizes = sorted({one.size for one in measured})
    of_size = [[one.scale for one in measured if one.size == size] for size in sizes]
    means = [sum(values) / len(values) for values in of_size]
    return Line(sizes, means, [*map(min, of_size)], [*map(max, of_size)])
