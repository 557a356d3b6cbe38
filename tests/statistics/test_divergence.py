"""Divergence as an outcome: judged by statsmodels' McNemar test, by hand, and by false alarms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as judge

from lit_llm.report.answer import answer
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.divergence import Outcomes, divergences, mcnemar
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.verdicts import DIFFERENT, LOST
from tests.statistics.simulated import study, within

NLL = "val/target_nll"


def outcomes(values: dict[int, float], diverged: set[int], initial: float | None = 9.0) -> Outcomes:
    kept = {seed: value for seed, value in values.items() if seed not in diverged}
    return Outcomes(kept, dict.fromkeys(diverged, initial))


def test_rates_are_compared_as_statsmodels_does() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        lost = random.random((2, 10)) < [[0.7], [0.2]]
        pair = [outcomes(dict.fromkeys(range(10), 1.0), {*np.flatnonzero(row).tolist()}) for row in lost]
        table = [[int(((lost[0] == a) & (lost[1] == b)).sum()) for b in (True, False)] for a in (True, False)]
        assert mcnemar(*pair) == pytest.approx(judge(table, exact=True).pvalue)
    assert mcnemar(outcomes({0: 1.0}, set()), outcomes({1: 1.0}, set())) is None


def test_bounds_count_diverged_runs_at_the_loss_they_began_with() -> None:
    arm, base = outcomes({0: 1.0, 1: 2.0, 2: 1.5}, {2}), outcomes({0: 3.0, 1: 3.5, 2: 4.0}, {1}, 8.0)
    (found,) = divergences({"base": base, "arm": arm}, {"arm": "base", "base": "base"}, is_loss=True)
    # The arm's third run at 1 or at 9, the baseline's second at 3 or at 8.
    assert found.bounds == pytest.approx(((1 + 2 + 1) / 3 - (3 + 8 + 4) / 3, (1 + 2 + 9) / 3 - (3 + 3 + 4) / 3))
    assert (found.diverged, found.runs, found.baseline_diverged, found.baseline_runs) == (1, 3, 1, 3)
    (other,) = divergences({"base": base, "arm": arm}, {"arm": "base", "base": "base"}, is_loss=False)
    assert other.bounds is None


def results(values: dict[str, dict[int, float]], lost: dict[str, set[int]]) -> list[RunResult]:
    return [
        RunResult(arm, "0", seed, "diverged", {"metrics": {}, "initial": {NLL: 9.0}, "parameters": 1, "flops": 1.0})
        if seed in lost.get(arm, ())
        else RunResult(arm, "0", seed, "done", {"metrics": {NLL: value}, "parameters": 1, "flops": 1.0})
        for arm, by_seed in values.items()
        for seed, value in by_seed.items()
    ]


def test_an_arm_that_loses_its_worst_runs_is_not_called_better() -> None:
    """Without any true effect; the mean of the better half alone would pass for better in one study of five."""
    random, count, alarms, naive = np.random.default_rng(1), 80, 0, 0
    for _ in range(count):
        values = study(random, [0.0, 0.0], seeds=10)
        deltas = {seed: values["1"][seed] - values["0"][seed] for seed in range(10)}
        worst = {*sorted(deltas, key=deltas.__getitem__)[5:]}
        kept = {"0": values["0"], "1": {seed: v for seed, v in values["1"].items() if seed not in worst}}
        row = compare(results(values, {"1": worst}), NLL).rows[1]
        alarms += row.verdict == "better"
        naive += compare(results(kept, {}), NLL).rows[1].verdict == "better"
    assert alarms == 0
    assert naive / count > 0.2 - within(0.2, count)


def test_a_verdict_against_the_side_that_lost_runs_stands() -> None:
    values = study(np.random.default_rng(2), [0.0, 3.0, -3.0], seeds=6)
    worse, better = compare(results(values, {"1": {0}, "2": {1}}), NLL).rows[1:]
    assert (worse.verdict, better.verdict) == ("worse", LOST)
    assert LOST not in DIFFERENT
    worse, better = compare(results(values, {"0": {0}}), NLL).rows[1:]
    assert (worse.verdict, better.verdict) == (LOST, "better")


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_run_that_is_done_without_a_finite_value_has_diverged(value: float | None) -> None:
    values = study(np.random.default_rng(3), [0.0, -3.0], seeds=6)
    lost = {0, 2, 4}
    runs = [
        replace(run, state="done", result=run.result | {"metrics": {NLL: value}}) if run.state == "diverged" else run
        for run in results(values, {"1": lost})
    ]
    found, diverged = compare(runs, NLL), compare(results(values, {"1": lost}), NLL)
    assert (found.rows[1].verdict, found.rows[1].states) == (LOST, {"done": 3, "diverged": 3})
    assert (found.rows, found.divergences) == (diverged.rows, diverged.divergences)
    assert any("not finite" in note and note.endswith(": 1 3") for note in found.notes)
    assert any(sentence.startswith("3 runs diverged") for sentence in answer(found))


def test_a_metric_that_no_run_has_is_no_divergence() -> None:
    found = compare(results(study(np.random.default_rng(3), [0.0, 0.0], seeds=2), {}), "val/target_nl")
    assert (found.divergences, found.rows[1].states) == ((), {"done": 2})
