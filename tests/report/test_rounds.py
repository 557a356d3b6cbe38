"""How the arms of a factorial look in figures: what carries which factor, what is one panel, what is left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from lit_llm.report.figures.lines import Line, Panel, proportion
from lit_llm.report.figures.study import Drawn, figures_of, write_figures
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation
from lit_llm.studies.mlflow_runs import record
from lit_llm.studies.palette import COLOURS, DASHES, arm_styles, panel_factors
from lit_llm.studies.runs import Run, runs_of
from tests.made_up_results import finish, finished_runs, loss_of, study_of

THREE = """
study: three
question: Which of three?
extends: decllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: 300}}
arms: {{dec: {{}}, wide: {{model: {{d_model: 32}}}}, tied: {{extends: redllm-tiny}}}}
seeds: [0, 1]
{compare}
"""


def drawn_of(ablation: Ablation, runs: Sequence[Run]) -> dict[str, Drawn]:
    return {one.name: one for one in figures_of(ablation, runs, comparison_of(ablation, runs))}


@pytest.fixture(scope="module")
def factorial(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ablation, list[Run], dict[str, Drawn]]:
    folder = tmp_path_factory.mktemp("looks")
    ablation = study_of(folder, corpus, "  labels: {output_norm: Output norm, q+k+v: all}")
    runs = finished_runs(ablation, Store(folder / "store"))
    return ablation, runs, drawn_of(ablation, runs)


def looks_in(axes: Axes) -> set[tuple[str, str]]:
    return {(to_hex(line.get_color()), str(vars(line)["_unscaled_dash_pattern"])) for line in axes.lines}


def test_colour_is_the_first_factor_and_dash_the_second_whatever_the_stratum(
    factorial: tuple[Ablation, list[Run], dict[str, Drawn]],
) -> None:
    ablation = factorial[0]
    assert panel_factors(ablation) == ["pretrain.training.optimizer.lr"]
    found = arm_styles(ablation)
    for arm in ablation.arms:
        out, qkv, _ = arm.levels.values()
        assert found[arm.name].colour == COLOURS[["none", "head"].index(out)]
        assert found[arm.name].dashes == DASHES[["none", "q+k+v"].index(qkv)]
    assert len({(look.colour, str(look.dashes), look.marker) for look in found.values()}) == len(ablation.arms)


def test_each_stratum_is_a_panel_with_the_same_lines_and_one_scale(
    factorial: tuple[Ablation, list[Run], dict[str, Drawn]],
) -> None:
    figure = factorial[2]["validation_pretrain"].figure
    assert [axes.get_title("left") for axes in figure.axes] == ["lr 0.001", "lr 0.01"]
    first, second = (looks_in(axes) for axes in figure.axes)
    assert first == second
    assert len(first) == 4
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    names = [entry.get_text() for entry in figure.legends[0].get_texts()]
    assert names == ["baseline", "qkv_norm all", "Output norm head", "Output norm head, qkv_norm all"]


def test_axes_that_show_one_curve_are_one_axis_that_says_what_a_step_takes(
    factorial: tuple[Ablation, list[Run], dict[str, Drawn]],
) -> None:
    """Of a made-up step 128 tokens and a million FLOPs."""
    axes = factorial[2]["validation_pretrain"].figure.axes[0]
    assert axes.get_xlabel() == "optimiser steps (each 128 tokens, 1M FLOPs)"


def test_an_axis_is_another_where_one_arm_takes_more_of_it() -> None:
    x, y = [1.0, 2.0, 3.0], [5.0, 4.0, 3.0]

    def panel(*times: float) -> Panel:
        return Panel("", "x", "y", {str(at): [Line([c * each for each in x], y)] for at, c in enumerate(times)})

    assert proportion([panel(1, 1)], [panel(7, 7)]) == 7
    assert proportion([panel(1, 1)], [panel(7, 8)]) is None
    other = Panel("", "x", "y", {"0": [Line(x, [5.0, 4.0, 2.0])]})
    assert proportion([panel(1)], [other]) is None
    assert proportion([panel(1)], [panel(2), panel(2)]) is None


def test_what_is_equal_by_design_or_has_one_point_is_not_drawn(corpus: Path, tmp_path: Path) -> None:
    ablation, store = study_of(tmp_path, corpus), Store(tmp_path / "store")
    runs = finished_runs(ablation, store)
    drawn = drawn_of(ablation, runs)
    assert "inference" not in drawn  # norms keep no keys and values
    assert "front" not in drawn
    assert {"validation_pretrain", "differences", "effects", "factors"} <= drawn.keys()
    for run in runs:
        finish(run, loss_of(run), steps=[300])
    assert not {"validation_pretrain", "training_pretrain", "stability"} & drawn_of(ablation, runs).keys()
    for run in runs:
        finish(run, 3.0)
    assert "differences" not in drawn_of(ablation, runs)


def test_an_arm_has_one_colour_in_all_figures_and_in_mlflow(corpus: Path, tmp_path: Path) -> None:
    ablation, store = study_of(tmp_path, corpus, "", THREE), Store(tmp_path / "store")
    runs = [run for run in runs_of(ablation, store) if run.arm.name != "wide"]  # one that has not begun
    for run in runs:
        finish(run, 3.0 + 0.1 * run.seed - 0.2 * (run.arm.name == "tied"))
    found = arm_styles(ablation)
    drawn = drawn_of(ablation, runs_of(ablation, store))
    for name in ("validation_pretrain", "training_pretrain", "front", "inference"):
        legend = drawn[name].figure.legends[0]
        colours = {
            text.get_text(): to_hex(handle.get_color())
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }
        assert colours["tied"] == found["tied"].colour == COLOURS[2], name
    tags = {run.arm.name: record(run, 0, found[run.arm.name].colour).tags["mlflow.runColor"] for run in runs}
    assert tags == {"dec": COLOURS[0], "tied": COLOURS[2]}


def test_arms_outside_the_grid_have_colours_that_its_levels_leave(factorial: tuple) -> None:
    ablation = factorial[0]
    apart = replace(ablation.arms[0], name="apart", group="apart", levels={})
    found = arm_styles(replace(ablation, arms=(*ablation.arms, apart)))
    assert found["apart"].colour not in {look.colour for name, look in found.items() if name != "apart"}


def test_a_pdf_is_a_column_or_two_wide_without_its_title_and_with_letters_as_truetype(
    factorial: tuple[Ablation, list[Run], dict[str, Drawn]], tmp_path: Path
) -> None:
    drawn = factorial[2]
    write_figures(list(drawn.values()), tmp_path)
    widths = set()
    for name in drawn:
        content = (tmp_path / f"{name}.pdf").read_bytes()
        width, height = map(float, re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", content).groups())
        widths.add(round(width / 72, 2))
        svg = re.search(r'height="([\d.]+)pt"', (tmp_path / f"{name}.svg").read_text())
        assert 8 < float(svg[1]) - height < 45, name  # the title is one line of 8.5 points, or two
        assert b"/CIDFontType2" in content or b"/TrueType" in content
        assert b"/Type3" not in content
    assert widths == {3.3, 6.9}
