"""A benchmark as tables and as a figure."""

from __future__ import annotations

import pytest

from lit_llm.report.figures.bench import bench_figure
from lit_llm.report.tables.bench import bench_tables
from tests.bench.small_bench import made_up


def test_a_table_has_both_heaps_and_what_was_left_out():
    here, steps, memory = bench_tables(made_up())
    assert ["machine", "a CPU"] in here.rows
    assert list(steps.head)[:7] == ["measure", "heap", "model", "median", "/ ours", "quartiles", "ceiling"]
    assert steps.rows[1] == ["step", "default", "Llama", "200 ms", "2.00", "1.60 to 2.20", "25%", "180 to 240"]
    assert [row[1:3] for row in steps.rows] == [
        ["default", "ours"], ["default", "Llama"], ["kept", "ours"], ["kept", "Llama"]
    ]  # fmt: skip
    notes = "\n".join(steps.notes)
    assert "the same function: ours, Llama (transformers)" in notes
    assert "parameters: ours 1.23M, Llama 1.23M" in notes
    assert "this machine, heap kept: 1GFLOP/s in a product of 2048 x 2048 matrices, 4 GB/s read, 2 GB/s copied" in notes
    assert steps.notes.count("without litgpt of litgpt: `pip install --no-deps litgpt` installs it") == 1
    assert memory.rows == [["peak", "kept", "ours", "3 MB", "1.00", "", "", ""]]


def test_the_figure_has_a_panel_for_each_measure_with_medians_and_quartiles():
    figure = bench_figure(made_up())
    titles = [(axes.get_title(loc="left"), axes.get_xlabel()) for axes in figure.axes]
    assert titles == [("training step, decoder", "step, ms"), ("memory of a step, decoder", "peak, MB")]
    steps = figure.axes[0]
    assert [label.get_text() for label in steps.get_yticklabels()] == ["ours", "Llama"]
    assert len(steps.containers) == 2, "one for each heap"
    medians, _, (bars,) = steps.containers[0]
    assert medians.get_xdata() == pytest.approx([100, 200])
    ends = [sorted(segment[:, 0]) for segment in bars.get_segments()]
    assert ends == [pytest.approx([90, 120]), pytest.approx([180, 240])]
