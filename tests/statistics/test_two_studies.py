"""Two studies with arms in common, judged by plain recomputation."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from scipy import stats

from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.before_after import before_after
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.document_noise import influence
from lit_llm.statistics.run_results import RunResult, values_by_arm
from lit_llm.statistics.two_studies import TwoStudies, two_studies

NLL = "val/target_nll"
NAMES = ("small", "large")
LUCK = {0: 0.0, 1: 0.04, 2: -0.03}


def runs(arms: dict[str, list[float]], baselines: dict[str, str] | None = None) -> list[RunResult]:
    """{arm: its loss with each seed}"""
    against = baselines or {}
    return [
        RunResult(arm, against.get(arm, "base"), seed, "done", {"metrics": {NLL: loss}, "parameters": 1, "flops": 1.0})
        for arm, losses in arms.items()
        for seed, loss in enumerate(losses)
    ]


def values_of(results: list[RunResult]) -> dict[str, dict[int, float]]:
    return values_by_arm(results, list(dict.fromkeys(run.arm for run in results)), NLL)


def both(first: list[RunResult], second: list[RunResult]) -> TwoStudies:
    return two_studies(
        NAMES,
        ("?", "?"),
        (compare(first, NLL), compare(second, NLL)),
        (values_of(first), values_of(second)),
        {},
    )


FIRST = {
    "base": [3.0, 3.04, 2.97],
    "a": [2.8, 2.85, 2.76],
    "b": [3.2, 3.23, 3.18],
    "c": [3.0, 3.05, 2.965],
    "old": [3.0] * 3,
}
SECOND = {
    "base": [2.0, 2.04, 1.97],
    "a": [1.9, 1.94, 1.86],
    "b": [1.9, 1.95, 1.88],
    "c": [2.3, 2.34, 2.28],
    "new": [2.0] * 3,
}


def test_the_change_is_the_paired_difference_of_differences() -> None:
    found = both(runs(FIRST), runs(SECOND))
    for arm in ("a", "b", "c"):
        (row,) = [row for row in found.arms.rows if row.arm == arm]
        gains = [
            (SECOND[arm][seed] - SECOND["base"][seed]) - (FIRST[arm][seed] - FIRST["base"][seed]) for seed in range(3)
        ]
        assert row.change is not None
        assert row.change.mean == pytest.approx(statistics.fmean(gains))
        assert (row.before, row.after) == pytest.approx((statistics.fmean(FIRST[arm]), statistics.fmean(SECOND[arm])))


def test_ranks_correlate_as_scipy_says() -> None:
    found = both(runs(FIRST), runs(SECOND))
    means = [[statistics.fmean(study[arm]) for arm in ("base", "a", "b", "c")] for study in (FIRST, SECOND)]
    assert found.arms.rank_correlation == pytest.approx(stats.spearmanr(means[0], means[1]).statistic)


def test_arms_agree_where_their_verdicts_do() -> None:
    found = both(runs(FIRST), runs(SECOND))
    assert {each.arm: each.says for each in found.agreements} == {
        "a": "the same",
        "b": "the opposite",
        "c": "only large",
    }
    assert found.alone == (("old",), ("new",))


def test_an_arm_without_results_in_one_of_them_is_missing_there() -> None:
    late = [RunResult("a", "base", seed, "pending") for seed in range(3)]
    found = both(runs(FIRST), runs({name: losses for name, losses in SECOND.items() if name != "a"}) + late)
    assert {each.arm: each.says for each in found.agreements}["a"] == "one is missing"
    (row,) = [row for row in found.arms.rows if row.arm == "a"]
    assert (row.after, row.change) == (None, None)


def test_an_arm_that_has_another_baseline_in_each_is_set_against_none() -> None:
    found = both(runs(FIRST), runs(SECOND, {"c": "a"}))
    assert found.baselines == ("c",)
    assert "c" not in {each.arm for each in found.agreements}
    (row,) = [row for row in found.arms.rows if row.arm == "c"]
    assert (row.difference_before, row.change) == (None, None)
    assert row.after == pytest.approx(statistics.fmean(SECOND["c"]))


def test_a_difference_that_one_study_shows_and_the_other_does_not_is_not_called_changed_without_a_test() -> None:
    """Both studies have the same truth; the second scatters more, so only the first shows it."""
    first = {"base": [3.0, 3.04, 2.97], "a": [2.9, 2.941, 2.869]}
    second = {"base": [3.0, 3.04, 2.97], "a": [2.8, 3.05, 2.82]}
    found = both(runs(first), runs(second))
    assert found.agreements[0].verdicts == ("better", "undecided")
    assert found.agreements[0].says == "compatible"


def test_studies_of_one_text_that_are_judged_on_other_windows_of_it_count_the_documents_of_both() -> None:
    """Twenty documents and twenty-four: what they have in common is unknown, so their variances add up."""
    random = np.random.default_rng(0)

    def study(documents: int) -> tuple[dict[str, dict[int, float]], Noise]:
        shift, influences = random.normal(0, 0.5, documents), {}
        values: dict[str, dict[int, float]] = {"a": {}, "b": {}}
        for seed, arm in itertools.product(range(4), "ab"):
            losses = 3.0 + shift * (arm == "b") + 0.001 * random.normal()
            values[arm][seed] = float(np.mean(losses))
            influences[arm, seed] = influence({str(n): (10 * loss, 10) for n, loss in enumerate(losses)})
        return values, Noise(influences=influences)

    (before, first), (after, second) = study(20), study(24)
    baselines = {"a": "a", "b": "a"}
    change = before_after("val/target_nll", before, after, baselines, (first, second), True).rows[1].change
    apart = before_after("val/target_nll", before, after, baselines, (first, second), False).rows[1].change
    assert change is not None
    assert change == apart
    assert change.documents == 44
    assert change.high - change.low > 0.3
