"""Paired differences: judged by scipy's t-test, by least squares on arms and seeds, and by coverage."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.formula.api import ols

from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.paired import paired_difference
from lit_llm.statistics.pooling import pooled_variance
from lit_llm.statistics.run_results import RunResult


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


@pytest.mark.parametrize("missing", [[], [(0, 1), (2, 4), (3, 3)]])
def test_pooled_variance_is_the_residual_of_the_two_way_table(missing: list[tuple[int, int]]) -> None:
    """Judge: statsmodels' least squares with a coefficient for every arm and seed; a missing run takes itself alone."""
    table = np.random.default_rng(1).normal(size=(4, 5))
    cells = [(arm, seed, table[arm, seed]) for arm, seed in np.ndindex(4, 5) if (arm, seed) not in missing]
    fit = ols("y ~ C(arm) + C(seed)", pandas.DataFrame(cells, columns=["arm", "seed", "y"])).fit()
    rows = [{seed: y for arm, seed, y in cells if arm == row} for row in range(4)]
    assert pooled_variance(rows) == pytest.approx((fit.mse_resid, fit.df_resid))
    assert pooled_variance([{0: 1.0}, {0: 2.0}]) is None


def test_a_pooled_interval_is_that_of_the_linear_model() -> None:
    """Judge: statsmodels' confidence interval of an arm's coefficient, the baseline being the reference."""
    table = np.random.default_rng(4).normal(size=(4, 5))
    cells = pandas.DataFrame([(f"{a}", s, table[a, s]) for a, s in np.ndindex(4, 5)], columns=["arm", "seed", "y"])
    low, high = ols("y ~ C(arm) + C(seed)", cells).fit().conf_int().loc["C(arm)[T.2]"]
    found = block_differences({str(a): seeded(row) for a, row in enumerate(table)}, "0", Noise("pooled"))["2"]
    assert found is not None
    assert found.pooled
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_intervals_cover_the_true_difference(seeds: int) -> None:
    """4 arms, known effects, seeds that move all arms: at least 95% of the intervals hold the truth."""
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
    assert np.mean(hits) >= 0.95 - 3 * (0.95 * 0.05 / 1000) ** 0.5


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
