"""All figures that a study has the numbers for, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_llm.config.markup import markdown_text
from lit_llm.report.figures.fonts import spell_out
from lit_llm.report.figures.from_comparison import (
    changes_by_finetuning,
    forests,
    fronts,
    heat_maps,
    learning_rates,
    stepwise_comparisons,
)
from lit_llm.report.figures.from_gate import gates
from lit_llm.report.figures.from_records import attention, extrapolation, inference
from lit_llm.report.figures.from_scaling import scaling
from lit_llm.report.figures.from_training_curves import learning, stability
from lit_llm.report.figures.inputs import Drawn, FigureData
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
    changes_by_finetuning,
    learning_rates,
    fronts,
    learning,
    stability,
    extrapolation,
    attention,
    inference,
)
"""Functions that draw the figures: results first, then training and evaluations."""


def figures_of(ablation: Ablation, runs: Sequence[Run], comparison: Comparison) -> list[Drawn]:
    """All figures for which a study has numbers; an arm that has not begun is left out.

    Curves and records are read for at most 24 arms, so the time does not grow with the study.
    """
    study = FigureData(ablation, runs, comparison)
    return [_with_printed_names(drawn, study) for draw in FIGURES for drawn in draw(study)]


def _with_printed_names(drawn: Drawn, study: FigureData) -> Drawn:
    """The figure with printed names in caption and title."""
    title = drawn.figure.get_suptitle().replace("\n", " ")
    if (printed := study.names.text(title)) != title:
        retitle(drawn.figure, printed)
    caption = study.names.text(drawn.caption)
    if spell_out(drawn.figure):
        caption += " Letters in brackets are code points: no font here has them (Noto Sans CJK has most)."
    return drawn._replace(caption=caption)


def write_figures(drawn: Sequence[Drawn], folder: Path, pdf: bool = True) -> list[Path]:
    """Write `<name>.png`, `.svg` and optionally `.pdf` of each figure, and `figures.md` with the captions."""
    files = [path for one in drawn for path in save(one.figure, folder / one.name, pdf)]
    tables = [
        f"## {one.name.replace('_', ' ')}\n\n![{one.name}]({one.name}.png)\n\n{markdown_text(one.caption)}\n"
        for one in drawn
    ]
    return [*files, write_text(folder / "figures.md", "\n".join(tables))]
