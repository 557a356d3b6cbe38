"""Power and sample size of a paired comparison: judged by statsmodels, and by counting simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lit_llm.statistics.power import (
    Scatter,
    minimum_detectable_difference,
    pooled,
    power,
    scatter_of,
    seeds_for,
)
from tests.statistics.simulated import within


@pytest.mark.parametrize("level", [0.05, 0.05 / 7])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_the_seeds_are_those_of_statsmodels(ratio: float, level: float) -> None:
    """TTestPower solves for a fraction of a seed: the next whole number is meant. Below two seeds it has no answer."""
    exact = TTestPower().solve_power(effect_size=ratio, power=0.8, alpha=level)
    assert seeds_for(0.02 * ratio, 0.02, 0.8, level) == max(2, math.ceil(float(np.squeeze(exact))))


@pytest.mark.parametrize("seeds", [2, 3, 10, 60])
def test_the_smallest_difference_is_that_of_statsmodels(seeds: int) -> None:
    exact = TTestPower().solve_power(nobs=seeds, power=0.8, alpha=0.05)
    assert minimum_detectable_difference(0.3, seeds) == pytest.approx(0.3 * float(np.squeeze(exact)), rel=1e-5)


def test_so_many_simulated_studies_detect_it_as_the_formula_says() -> None:
    count, seeds = 20_000, 5
    differences = np.random.default_rng(0).normal(0.02, 0.015, (count, seeds))
    detected = float(np.mean(stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05))
    assert detected == pytest.approx(power(0.02, 0.015, seeds), abs=within(0.7, count))


def test_no_number_of_seeds_shows_next_to_nothing_and_two_show_what_has_no_scatter() -> None:
    assert seeds_for(1e-6, 1.0) is None
    assert seeds_for(0.02, 0.0) == 2
    with pytest.raises(ValueError, match="two seeds or more"):
        power(0.1, 0.1, 1)


def test_the_upper_limit_covers_the_true_scatter_in_four_of_five_pilots() -> None:
    """Three seeds of N(0, 1): an estimate is below the truth more often than not, its limit in one of five."""
    count = 20_000
    sds = np.random.default_rng(1).normal(size=(count, 3)).std(axis=1, ddof=1)
    factor = Scatter(1.0, 2).upper
    assert np.mean(sds * factor > 1) == pytest.approx(0.8, abs=within(0.8, count))


def test_scatter_is_of_shared_seeds_and_is_pooled_by_degrees_of_freedom() -> None:
    arm, baseline = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {0: 0.0, 1: 0.0, 2: 1.0, 5: 3.0}
    assert scatter_of(arm, baseline) == Scatter(pytest.approx(1.0), 2)  # of 1, 2, 3
    assert scatter_of(arm, {0: 0.0}) is None
    assert scatter_of(arm, arm) is None
    assert pooled([]) is None
    assert pooled([Scatter(1.0, 2), Scatter(2.0, 1)]) == Scatter(pytest.approx(math.sqrt(2)), 3)
