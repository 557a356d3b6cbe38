"""A Pareto front against measured seconds of training."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from lit_llm.report.figures.study import figures_of
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.runs import Run
from tests.made_up_results import finished_runs, study_of


def seconds_of(run: Run) -> float:
    """A norm on the output costs 10 seconds, norms on Q, K, V cost 4, each seed one more."""
    levels = run.arm.levels
    normed = 10 * (levels["model.attention.output_norm"] == "head") + 4 * (
        levels["model.attention.qkv_norm"] == "q+k+v"
    )
    return 20.0 + normed + run.seed


def measure(run: Run, seconds: float) -> None:
    file = run.last.folder / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": {"training": seconds}}))


def test_a_front_against_measured_seconds_leaves_out_what_was_not_measured(corpus: Path, tmp_path: Path) -> None:
    ablation = study_of(tmp_path, corpus, "  front: training_seconds")
    runs = finished_runs(ablation, Store(tmp_path / "store"))
    unmeasured = runs[-1].arm.name
    for run in runs:
        if run.arm.name != unmeasured:
            measure(run, seconds_of(run))
    compared = comparison_of(ablation, runs)
    front = compared.front
    assert front is not None
    expected = {
        arm.name: statistics.fmean(seconds_of(run) for run in runs if run.arm.name == arm.name)
        for arm in ablation.arms
        if arm.name != unmeasured
    }
    assert {point.arm: point.cost for point in front.points} == pytest.approx(expected)
    assert f"without measured seconds of training, so not on the front: {unmeasured}" in compared.notes
    means = {row.arm: row.mean for row in compared.rows if row.mean is not None}
    for point in front.points:
        beats = [a for a in expected if expected[a] <= point.cost and means[a] < means[point.arm]]
        assert (point.beaten_by is None) == (not beats)
    (table,) = [table for table in comparison_tables(compared) if table.name == "front"]
    assert list(table.head) == ["arm", "training seconds", "mean", ""]
    (drawn,) = [one for one in figures_of(ablation, runs, compared) if one.name == "front"]
    axes = drawn.figure.axes[0]
    assert axes.get_xlabel() == "measured seconds of training"
    points = [
        float(np.asarray(line.get_xdata())[0]) for line in axes.lines if line.get_marker() not in ("None", "", None)
    ]
    assert sorted(points) == pytest.approx(sorted(expected.values()))
    assert "seconds are measured, other costs computed" in drawn.caption
