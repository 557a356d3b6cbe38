"""All figures that a study has the numbers for, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_llm.config.markup import markdown_text
from lit_llm.report.figures.fonts import spell_out
from lit_llm.report.figures.from_comparison import forests, fronts, heat_maps, rates, stepwise_comparisons, turn
from lit_llm.report.figures.from_gate import gates
from lit_llm.report.figures.from_records import attention, extrapolation, inference
from lit_llm.report.figures.from_scaling import scaling
from lit_llm.report.figures.from_training_curves import learning, stability
from lit_llm.report.figures.inputs import Drawn, Shown
from lit_llm.report.figures.style import retitle, save
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.store import write_text
from lit_llm.studies.load import Ablation
from lit_llm.studies.runs import Run

__all__ = ["Drawn", "figures_of", "write_figures"]

FIGURES = (
    scaling,
    gates,
    forests,
    stepwise_comparisons,
    heat_maps,
    turn,
    rates,
    fronts,
    learning,
    stability,
    extrapolation,
    attention,
    inference,
)
"""What was found, then how it came about; each draws what there are numbers for."""


def figures_of(ablation: Ablation, runs: Sequence[Run], comparison: Comparison) -> list[Drawn]:
    """What can be drawn of a study now; an arm that has not begun is left out.

    Courses and records are read of at most 24 arms, so the time does not grow with the study.
    """
    shown = Shown(ablation, runs, comparison)
    return [_printed(drawn, shown) for draw in FIGURES for drawn in draw(shown)]


def _printed(drawn: Drawn, shown: Shown) -> Drawn:
    """With printed names in the caption and in the title."""
    title = drawn.figure.get_suptitle().replace("\n", " ")
    if (printed := shown.names.text(title)) != title:
        retitle(drawn.figure, printed)
    caption = shown.names.text(drawn.caption)
    if spell_out(drawn.figure):
        caption += " Letters in brackets are code points: no font here has them (Noto Sans CJK has most)."
    return drawn._replace(caption=caption)


def write_figures(drawn: Sequence[Drawn], folder: Path, pdf: bool = True) -> list[Path]:
    """`<name>.png`, `.svg` and, where it is asked for, `.pdf` of each, and `figures.md` with the captions."""
    files = [path for one in drawn for path in save(one.figure, folder / one.name, pdf)]
    tables = [
        f"## {one.name.replace('_', ' ')}\n\n![{one.name}]({one.name}.png)\n\n{markdown_text(one.caption)}\n"
        for one in drawn
    ]
    return [*files, write_text(folder / "figures.md", "\n".join(tables))]
