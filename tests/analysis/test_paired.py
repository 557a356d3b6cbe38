"""Paired differences: judged by scipy's t-test, by the textbook's randomised block design, and by coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lit_llm.analysis.comparison import RunResult, compare
from lit_llm.analysis.paired import block_differences, paired_difference, pooled_variance, scatter_alike


def seeded(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def test_the_interval_is_that_of_scipys_paired_t_test() -> None:
    random = np.random.default_rng(0)
    baseline, arm = random.normal(3.0, 0.1, 6), random.normal(2.9, 0.1, 6)
    interval = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    found = paired_difference(seeded(arm), seeded(baseline))
    assert found is not None
    assert found.mean == pytest.approx((arm - baseline).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.degrees == 5


def test_one_seed_has_a_difference_and_no_interval() -> None:
    found = paired_difference({0: 2.0}, {0: 3.0})
    assert found is not None
    assert (found.mean, found.low, found.high) == (-1.0, None, None)


def test_only_common_seeds_are_paired() -> None:
    found = paired_difference({0: 2.0, 1: 2.5, 7: 100.0}, {0: 3.0, 1: 3.0, 9: -100.0})
    assert found is not None
    assert (found.mean, found.seeds) == (-0.75, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pooled_variance_is_the_residual_of_the_two_way_table() -> None:
    """Judge: least squares on the design matrix of arms and seeds."""
    table = np.random.default_rng(1).normal(size=(4, 5))
    arms, seeds = table.shape
    cells = [(arm, seed) for arm in range(arms) for seed in range(seeds)]
    design = np.array([[a == i for i in range(arms)] + [s == j for j in range(1, seeds)] for a, s in cells], float)
    _, residual, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    assert pooled_variance([seeded(row) for row in table]) == pytest.approx(residual[0] / (table.size - rank))


def test_pooling_needs_equal_seeds_three_arms_and_equal_scatter() -> None:
    random = np.random.default_rng(2)
    draws = [[seeded(random.normal(size=5)) for _ in range(4)] for _ in range(200)]
    assert sum(pooled_variance(rows) is not None for rows in draws) > 180  # the check errs in about one of twenty
    rows = next(rows for rows in draws if pooled_variance(rows) is not None)
    assert pooled_variance(rows[:2]) is None
    assert pooled_variance([*rows[:2], dict(list(rows[2].items())[:4])]) is None
    assert pooled_variance([{0: 1.0}, {0: 2.0}, {0: 3.0}]) is None
    wild = [seeded(random.normal(size=20)), seeded(random.normal(size=20)), seeded(random.normal(0, 50, size=20))]
    assert pooled_variance(wild) is None


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_intervals_cover_the_true_difference(seeds: int) -> None:
    """4 arms, known effects, seeds with a luck of their own: 95% of the intervals hold the truth."""
    random, effects, hits = np.random.default_rng(3), [0.0, 0.1, -0.3, 0.0], []
    for _ in range(1000):
        luck = random.normal(0, 1, seeds)
        block = {str(i): seeded(effect + luck + random.normal(0, 0.2, seeds)) for i, effect in enumerate(effects)}
        for name, found in block_differences(block, "0").items():
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            hits.append(found.low <= effects[int(name)] <= found.high)
    # Three differences of one block share a baseline; a thousand blocks are the independent units.
    assert np.mean(hits) == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 1000) ** 0.5)


def finished(arm: str, seed: int, value: float, code: str = "x") -> RunResult:
    result = {"metrics": {"val/target_nll": value}, "parameters": 1, "flops": 1.0, "finished": seed}
    result["provenance"] = {"code": code}
    return RunResult(arm, "a", seed, "done", result)


def test_a_diverged_run_is_counted_and_never_becomes_a_number() -> None:
    lost = RunResult("b", "a", 1, "diverged", {**finished("b", 1, 1e9).result})
    table = compare([finished("a", 0, 1.0), finished("a", 1, 2.0), finished("b", 0, 3.0), lost], "val/target_nll")
    row = table.rows[1]
    assert (row.mean, row.seeds, row.diverged) == (3.0, 1, 1)
    assert row.difference is not None
    assert row.difference.mean == 2.0


def test_results_of_two_codes_are_not_compared() -> None:
    table = compare([finished("a", 0, 1.0, "old"), finished("b", 1, 3.0, "new")], "val/target_nll")
    assert table.rows[0].mean is None
    assert table.rows[1].mean == 3.0
    assert any("1 result(s) of other code" in note for note in table.notes)


def test_a_missing_metric_leaves_a_gap_and_no_crash() -> None:
    table = compare([finished("a", 0, 1.0), finished("b", 0, float("nan"))], "val/target_nll")
    assert table.rows[1].mean is None
    assert "b,a,val/target_nll,0,,,,," in table.csv()


@pytest.mark.parametrize(("rows", "seeds"), [(2, 2), (3, 3), (10, 4), (400, 3)])
def test_rows_scatter_alike_where_scipys_bartlett_test_finds_no_sign_that_they_do_not(rows: int, seeds: int) -> None:
    random, found = np.random.default_rng(6), set()
    for spread in np.linspace(0, 3 / rows**0.25, 40):
        values = random.normal(0, 1, (rows, seeds)) * np.exp(random.normal(0, spread, (rows, 1)))
        alike = bool(stats.bartlett(*values).pvalue >= 0.05)
        assert scatter_alike(values.tolist()) == alike
        found.add(alike)
    assert found == {True, False}
    assert not scatter_alike([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])  # scipy divides by zero
