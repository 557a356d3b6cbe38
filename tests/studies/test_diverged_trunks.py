"""A trunk counts in its study as the same steps of an uncut training do. All results are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_llm.report.figures.from_training_curves import learning
from lit_llm.report.figures.inputs import FigureData
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.run_results import RunResult
from lit_llm.store.store import Stage, Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.runs import Run, runs_of

METRIC = "val/target_nll"
ARMS = """
arms: {low: {}, high: {pretrain: {training: {optimizer: {lr: 1}}}}}
allow: [{key: pretrain.training.optimizer, because: it diverges}]
compare: {metric: val/target_nll}
"""
BRANCHES = ", branch_at: [5, 10]"
Ends = dict[str, tuple[str, int, float | None]]
"""{name of a stage: its state, steps and metric}."""
WSD = "pretrain.training.schedule={kind: wsd, decay_steps: 2%s}"


def end(stage: Stage, state: str, steps: int, value: float | None = None) -> None:
    """Give a stage a result, and the lines of its metrics from the first step on."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "time": 1.0 * step, "metrics": {"train/loss": 5.0, "tokens": 100 * step}}
        for step in range(2, steps + 1, 2)
    ]
    stage.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"parameters": 1000, "tokens": 100 * steps, "flops": 1e6 * steps, "steps": steps}
    measured = {"metrics": {} if value is None else {METRIC: value}, "initial": {METRIC: 5.5}}
    stage.finish(
        {"state": state, **measured, **counts, "finished": 1.0, "seconds": {"training": 1.0}, "provenance": {}}
    )


def end_stages(run: Run, ends: Ends) -> None:
    for step in run.steps:
        if step.node.name in ends:
            end(step.stage, *ends[step.node.name])


OfStudy = Callable[[str], tuple[Ablation, list[Run]]]


@pytest.fixture
def study(tmp_path: Path, write_study: Callable[..., Path]) -> OfStudy:
    """The study with these branches, and its runs in a store of its own."""

    def of(branches: str) -> tuple[Ablation, list[Run]]:
        ablation = load_study(write_study("lengths", ARMS, (0, 1, 2)), [WSD % branches])
        return ablation, runs_of(ablation, Store(tmp_path / f"store{len(branches)}"))

    return of


@pytest.mark.parametrize(("lost_at", "steps"), [("trunk_5", 4), ("trunk_10", 8)])
def test_a_diverged_trunk_counts_as_the_same_steps_of_an_uncut_training(
    study: OfStudy, lost_at: str, steps: int
) -> None:
    compared: list[Comparison] = []
    results: list[list[RunResult]] = []
    curves: list[list[Any]] = []
    for branches in ("", BRANCHES):
        stages = {"trunk_5": 5, "trunk_10": 10} if branches else {}
        ablation, runs = study(branches)
        for run in runs:
            value = 4.0 + 0.01 * run.seed + 0.1 * (run.arm.name == "high")
            ends: Ends = {name: ("done", end, None) for name, end in stages.items()}
            ends["pretrain"] = ("done", 12, value)
            if (run.arm.name, run.seed) == ("high", 2):
                ends = {name: each for name, each in ends.items() if name != "pretrain" and each[1] <= steps}
                ends[lost_at if branches else "pretrain"] = ("diverged", steps, None)
            end_stages(run, ends)
        compared.append(found := comparison_of(ablation, runs))
        results.append([shown(run.result()) for run in runs])
        (drawn,) = [each for each in learning(FigureData(ablation, runs, found)) if each.name == "training_pretrain"]
        curves.append([np.asarray(line.get_xydata()).tolist() for line in drawn.figure.axes[0].lines])
    uncut, branched = compared
    assert {row.arm: row.diverged for row in branched.rows} == {"low": 0, "high": 1}
    assert branched.divergences
    assert branched.divergences == uncut.divergences
    assert branched.rows == uncut.rows
    assert results[1] == results[0]
    assert curves[1] == curves[0]


def shown(run: RunResult) -> RunResult:
    """Without what each stage has one of, and digests of files."""
    result = {key: value for key, value in run.result.items() if key not in ("origins", "files")}
    return replace(run, states={}, result=result)


def test_a_trunk_that_is_done_is_no_result_and_no_finished_curve(study: OfStudy) -> None:
    ablation, runs = study(BRANCHES)
    for run in runs:
        end_stages(run, {"trunk_5": ("done", 5, None)})
    assert not any(run.result().result for run in runs)
    (drawn,) = learning(FigureData(ablation, runs, comparison_of(ablation, runs)))
    assert sum(np.size(line.get_xydata()) > 0 for line in drawn.figure.axes[0].lines) == len(runs)  # no mean of several


def test_the_frame_of_a_run_has_each_step_once(study: OfStudy) -> None:
    """Each stage logs all steps from the first on."""
    _, runs = study(BRANCHES)
    trunks: Ends = {"trunk_5": ("done", 5, None), "trunk_10": ("done", 10, None)}
    end_stages(runs[0], trunks)
    end_stages(runs[1], {**trunks, "pretrain": ("done", 12, 4.0)})
    begun, whole = (run.to_frame() for run in runs[:2])
    assert [*zip(begun["stage"], begun["step"], strict=True)] == [("trunk_10", step) for step in (2, 4, 6, 8, 10)]
    assert [*zip(whole["stage"], whole["step"], strict=True)] == [("pretrain", step) for step in (2, 4, 6, 8, 10, 12)]
