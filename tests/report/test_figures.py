"""Figures, read back from what is drawn: the numbers are computed plainly here, the rest is legibility."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from lit_llm.report.figures.differences import Crossed, End, Named, Stepwise, forest, heat_map, slopes, waterfall
from lit_llm.report.figures.lines import Line, Panel, line_figure, over_seeds, single
from lit_llm.report.figures.pareto import Profile, front_figure, isoflop_figure, scaling_figure
from lit_llm.report.figures.style import BLUE, GREEN, GREY, VERMILION, line_styles, save, short
from lit_llm.statistics.paired import Difference, paired_difference
from lit_llm.statistics.pareto import pareto_front

LONG = [f"encoder_decoder/attention.output_norm=none/optimizer.lr={i}e-{i % 4}" for i in range(24)]
"""As many arms as a figure has lines for, with names longer than a legend's column."""
RUNS = [{step: (10.0 * step, math.exp(-step / (5 + seed)) + 3) for step in range(1, 21)} for seed in range(3)]


def difference(mean: float, half: float | None = 0.1, seeds: int = 4) -> Difference:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(mean, seeds, low, high)


def a_front(names: list[str]) -> Figure:
    costs = {name: 1e9 * 1.5**i for i, name in enumerate(names)}
    means = {name: 5 - 0.1 * i + (i % 3) * 0.3 for i, name in enumerate(names)}
    found = pareto_front("train_flops", "val/target_nll", costs, means)
    return front_figure("loss against cost", [found], dict.fromkeys(names, 0.02), names)


def a_forest(names: list[str]) -> Figure:
    verdicts = itertools.cycle(["better", "worse", "not enough seeds", "no difference larger than 0.02"])
    rows = [
        Named(name, difference(0.05 * (i - 3)), said)
        for i, (name, said) in enumerate(zip(names, verdicts, strict=False))
    ]
    return forest("differences", {"output_norm": rows[:3], "lr": rows[3:]}, "difference, nats")


def a_ladder(names: list[str]) -> Figure:
    steps = tuple(Named(name, difference(0.2 * (-1) ** i), "worse") for i, name in enumerate(names[1:]))
    return waterfall("step by step", [Stepwise(names[0], 5.0, steps)], "nats per token")


def a_map(names: list[str]) -> Figure:
    levels = tuple(names[:6])
    means = tuple(tuple(4 + 0.1 * i + 0.01 * j for j in range(len(levels))) for i in range(3))
    lost = tuple((0,) * len(levels) for _ in range(3))
    return heat_map("by two", [Crossed("width", "rate", levels[:3], levels, means, lost)] * 2, "nats")


def a_turn(names: list[str]) -> Figure:
    pairs = {
        name: (End(0.1 * i, 0.1 * i - 0.1, 0.1 * i + 0.1), End(-0.1 * i, None, None)) for i, name in enumerate(names)
    }
    return slopes("before and after", pairs, "difference, nats", ("before", "after"), "when")


def a_course(names: list[str]) -> Figure:
    lines = {name: [line for line in [over_seeds(RUNS)] if line] for name in names}
    panels = [Panel("", label, "nats per token", lines, log) for label, log in (("steps", ""), ("FLOPs", "x"))]
    return line_figure("learning curves", panels)


def a_scaling(names: list[str]) -> Figure:
    curve = [(10.0**i, 4.0 - 0.1 * i) for i in range(15, 21)]
    law = {name: Line([x for x, _ in curve], [y for _, y in curve]) for name in names}
    return scaling_figure(
        "scaling", dict.fromkeys(["FLOPs", "tokens"], dict.fromkeys(names, curve)), {"FLOPs": law}, "nats"
    )


def an_isoflop(names: list[str]) -> Figure:
    curve = [(10.0**i, 3.0 + (i - 7) ** 2) for i in range(5, 10)]
    return isoflop_figure("isoFLOP", {"decoder": [Profile(name, curve, curve, (1e7, 3.0)) for name in names]})


EVERY = [a_front, a_forest, a_ladder, a_map, a_turn, a_course, a_scaling, an_isoflop]
MANY = pytest.mark.parametrize("names", [["red", "dec", "dec_prefix"], LONG], ids=["few", "24 long names"])


# --- what is drawn is what was computed -----------------------------------------------------------------------------


def test_a_band_goes_from_the_lowest_to_the_highest_seed_around_their_mean() -> None:
    line = over_seeds(RUNS)
    assert line is not None
    (axes,) = line_figure("t", [Panel("", "x", "y", {"red": [line]})]).axes
    for step in range(1, 21):
        values = [run[step][1] for run in RUNS]
        assert line.x[step - 1] == 10.0 * step
        assert line.y[step - 1] == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert (line.low[step - 1], line.high[step - 1]) == (min(values), max(values))
    (drawn,) = axes.lines
    assert list(drawn.get_xdata()) == list(line.x)
    assert list(drawn.get_ydata()) == list(line.y)
    corners: Any = axes.collections[0].get_paths()[0].vertices
    edges = {(round(x, 9), round(y, 9)) for x, y in corners}
    assert {(x, round(y, 9)) for x, y in zip(line.x, line.low, strict=True)} <= edges
    assert {(x, round(y, 9)) for x, y in zip(line.x, line.high, strict=True)} <= edges


def test_a_mean_is_taken_only_where_every_finished_run_has_a_value() -> None:
    """Else it would jump where one of them has none."""
    line = over_seeds([RUNS[0], {step: RUNS[1][step] for step in range(5, 30) if step in RUNS[1]}])
    assert line is not None
    assert line.x[0] == 50.0
    assert over_seeds([]) is None
    assert over_seeds([{1: (1.0, 1.0)}, {2: (2.0, 2.0)}]) is None


def test_one_seed_has_no_band() -> None:
    line = over_seeds(RUNS[:1])
    assert line is not None
    assert not line.low


def test_a_run_that_diverged_is_a_thin_line_that_ends_in_a_cross() -> None:
    lines = [Line([1, 2], [3.0, 2.0]), single({1: (1, 4.0), 2: (2, 9.0)}, lost=True)]
    mean, run, cross = line_figure("t", [Panel("", "x", "y", {"red": lines})]).axes[0].lines
    assert run.get_linewidth() < mean.get_linewidth()
    assert (cross.get_marker(), list(cross.get_xdata()), list(cross.get_ydata())) == ("x", [2], [9.0])


def test_a_forest_shows_every_interval_from_end_to_end() -> None:
    arm, baseline = {0: 5.1, 1: 5.3, 2: 5.0}, {0: 5.0, 1: 5.1, 2: 5.0}
    found = paired_difference(arm, baseline)
    assert found is not None
    (axes,) = forest("t", {"": [Named("red", found, "undecided")]}, "nats").axes
    _, bar, mark = axes.lines  # the first is zero
    deltas = [0.1, 0.2, 0.0]
    half = 4.302653 * statistics.stdev(deltas) / math.sqrt(3)  # t of 2 degrees of freedom, from a table
    assert list(bar.get_xdata()) == pytest.approx([0.1 - half, 0.1 + half], rel=1e-6)
    assert list(mark.get_xdata()) == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("said", "mean", "colour", "marker"),
    [
        ("better", -0.2, BLUE, "v"),
        ("better", 0.2, BLUE, "^"),
        ("worse", 0.2, VERMILION, "^"),
        ("lower", -0.2, "#000000", "v"),
        ("no difference larger than 0.3", -0.2, GREEN, "s"),
        ("undecided", -0.2, GREY, "o"),
        ("not enough seeds", -0.2, GREY, "o"),
    ],
)
def test_the_marker_is_the_verdict_of_the_analysis_whatever_the_interval(
    said: str, mean: float, colour: str, marker: str
) -> None:
    """After Holm's correction an interval can exclude 0 where nothing is decided: the words are the tables'."""
    row = Named("red", difference(mean, 0.1), said)
    mark = forest("t", {"": [row]}, "nats").axes[0].lines[-1]
    assert (to_hex(mark.get_color()), mark.get_marker()) == (colour, marker)
    assert (to_hex(mark.get_markerfacecolor()) == "#ffffff") == (colour == GREY)
    for drawn in (forest("t", {"": [row]}, "nats"), waterfall("t", [Stepwise("dec", 5.0, (row,))], "nats")):
        assert [entry.get_text() for entry in drawn.legends[0].get_texts()] == [said]
    (bar,) = waterfall("t", [Stepwise("dec", 5.0, (row,))], "nats").axes[0].patches
    assert to_hex(bar.get_edgecolor()) == colour


def test_each_rung_begins_where_the_one_before_it_ends() -> None:
    ladder = Stepwise("dec", 5.0, (Named("prefix", difference(0.2), "worse"), Named("red", difference(-0.5), "better")))
    axes: Any = waterfall("t", [ladder], "nats").axes[0]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [(5.0, pytest.approx(5.2)), (pytest.approx(5.2), pytest.approx(4.7))]
    intervals = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 0.9]
    assert [list(ends) for ends in intervals] == [pytest.approx([5.1, 5.3]), pytest.approx([4.6, 4.8])]


def test_a_field_of_the_map_says_its_mean_its_verdict_and_what_diverged() -> None:
    signs = (("", ""), ("▼", "■"))
    crossed = Crossed("a", "b", ("1", "2"), ("x", "y"), ((4.0, None), (4.5, 5.0)), ((0, 2), (1, 0)), signs)
    axes = heat_map("t", [crossed], "nats").axes[0]
    told = {(text.get_position()): text.get_text() for text in axes.texts}
    assert told == {(0, 0): "4.000", (1, 0): "†2", (0, 1): "4.500 ▼\n†1", (1, 1): "5.000 ■"}
    assert axes.images[0].get_array().tolist() == [[4.0, None], [4.5, 5.0]]


def test_what_no_arm_beats_is_filled_and_joined() -> None:
    found = pareto_front(
        "train_flops", "val/target_nll", {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 6.0, "c": 4.0}
    )
    axes = front_figure("t", [found], {}, ["a", "b", "c"]).axes[0]
    stairs, *marks = axes.lines
    assert list(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True)) == [(1.0, 5.0), (3.0, 4.0)]
    hollow = {tuple(mark.get_xdata()) for mark in marks if to_hex(mark.get_markerfacecolor()) == "#ffffff"}
    assert hollow == {(2.0,)}


def test_before_and_after_stand_at_the_ends_of_a_line() -> None:
    both = {"red": (End(0.3, 0.2, 0.4), End(-0.1, -0.2, 0.0))}
    axes = slopes("t", both, "nats", ("before", "after"), "when").axes[0]
    assert list(axes.lines[-1].get_ydata()) == [0.3, -0.1]
    ends = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 0.7]
    assert ends == [pytest.approx([0.2, 0.4]), pytest.approx([-0.2, 0.0])]


def test_points_and_fits_keep_their_values_and_the_optimum_is_starred() -> None:
    points, curve = [(1e6, 3.5), (1e8, 3.2)], [(1e6, 3.4), (1e7, 3.1), (1e8, 3.3)]
    axes = isoflop_figure("t", {"decoder": [Profile("1e18", points, curve, (1e7, 3.1))]}).axes[0]
    fitted, measured, optimum = (list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines)
    assert (fitted, measured, optimum) == (curve, points, [(1e7, 3.1)])
    assert axes.lines[-1].get_marker() == "*"
    assert axes.get_xscale() == "log"


# --- it can be read -------------------------------------------------------------------------------------------------


@MANY
@pytest.mark.parametrize("draw", EVERY)
def test_every_figure_has_a_title_and_named_axes(draw: Any, names: list[str]) -> None:
    figure = draw(names)
    assert figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"


@MANY
@pytest.mark.parametrize("draw", [a_front, a_turn, a_course, a_scaling, an_isoflop])
def test_every_name_has_an_entry_in_the_legend(draw: Any, names: list[str]) -> None:
    (legend,) = draw(names).legends
    assert [text.get_text() for text in legend.get_texts()] == [short(name) for name in names]


@MANY
@pytest.mark.parametrize("draw", EVERY)
def test_no_words_cover_others_or_leave_the_page(draw: Any, names: list[str]) -> None:
    """Of the ticks of one axis, of the legend's entries, and of legend and axes among each other."""
    figure = draw(names)
    figure.draw_without_rendering()
    page = figure.bbox.padded(1.0)
    boxes: list[list[Any]] = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            shown = [poll for place, poll in ticks if low <= place <= high]
            if not any(poll.get_rotation() for poll in shown):
                boxes.append([poll.get_window_extent() for poll in shown])
        boxes.append([axes.xaxis.label.get_window_extent()])
        boxes.append([axes.yaxis.label.get_window_extent()])
    for legend in figure.legends:
        boxes.append([text.get_window_extent() for text in legend.get_texts()])
        boxes.append([legend.get_window_extent(), *(axes.bbox for axes in figure.axes)])
    for group in boxes:
        for one, other in itertools.combinations(group, 2):
            assert not one.padded(-0.5).overlaps(other.padded(-0.5)), (one, other)
    for label in [box for group in boxes for box in group]:
        assert page.x0 <= label.x0
        assert label.x1 <= page.x1


def test_24_arms_differ_in_colour_or_dashes_and_the_colours_in_lightness_or_hue() -> None:
    found = line_styles(LONG)
    assert len({(look.colour, str(look.dashes)) for look in found.values()}) == 24
    assert next(iter(found.values())).colour == "#000000"
    for one, other in itertools.combinations({look.colour for look in found.values()}, 2):
        assert math.dist(to_rgb(one), to_rgb(other)) > 0.25


def test_letters_are_at_least_six_points_high() -> None:
    """At the size it is saved, which is at most the width of a page: 7 inches."""
    for draw in EVERY:
        figure = draw(["red", "dec", "dec_prefix"])
        assert figure.get_figwidth() <= 7.0
        artists: list[Any] = figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
        texts = [text for text in artists if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 6


@pytest.mark.parametrize("draw", EVERY)
def test_the_same_data_give_the_same_files(draw: Any, tmp_path: Path) -> None:
    first, second = (save(draw(["red", "dec", "dec_prefix"]), tmp_path / name / "figure") for name in ("one", "two"))
    assert [path.suffix for path in first] == [".png", ".svg", ".pdf"]
    for one, two in zip(first, second, strict=True):
        assert one.stat().st_size > 1000
        assert one.read_bytes() == two.read_bytes()


def test_what_matplotlib_is_set_to_changes_nothing(tmp_path: Path) -> None:
    from matplotlib import rc_context

    plain = save(a_course(["red", "dec"]), tmp_path / "plain")[1].read_bytes()
    with rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": False}):
        assert save(a_course(["red", "dec"]), tmp_path / "other")[1].read_bytes() == plain


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        line_figure("t", [])


def test_a_name_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    for path in save(a_forest([rf"lr=${i}\no$" for i in range(6)]), tmp_path / "forest"):
        assert path.stat().st_size > 0
