"""Signal, noise and decision accuracy: against statsmodels, scipy and formulas, and in simulations of a known truth."""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from lit_llm.statistics.signal_and_noise import (
    checkpoint_noise,
    decision_accuracy,
    last_validations,
    signal_and_noise,
)
from tests.statistics.simulated import study, within

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)  # it imports another one
    coverage_noise = importlib.import_module("coverage_noise")

EFFECTS = [0.0, 0.3, -0.2, 0.5]


def test_mean_squares_are_those_of_statsmodels_and_the_signal_is_the_papers() -> None:
    values = study(np.random.default_rng(0), EFFECTS, 5)
    found = signal_and_noise(values)
    assert found is not None
    rows = [(arm, seed, y) for arm, by_seed in values.items() for seed, y in by_seed.items()]
    table = anova_lm(ols("y ~ C(arm) + C(seed)", pd.DataFrame(rows, columns=["arm", "seed", "y"])).fit())
    of_seeds, residual = table["mean_sq"]["C(seed)"], table["mean_sq"]["Residual"]
    mean = statistics.fmean(y for *_, y in rows)
    means = [statistics.fmean(each.values()) for each in values.values()]
    assert found.signal is not None
    assert found.noise is not None
    assert found.paired_noise is not None
    assert found.signal.value == pytest.approx(max(abs(a - b) for a in means for b in means) / mean)
    assert found.paired_noise.value == pytest.approx(math.sqrt(residual) / mean)
    assert found.noise.value == pytest.approx(math.sqrt((of_seeds + 3 * residual) / 4) / mean)
    within_arms = statistics.fmean(statistics.variance(each.values()) for each in values.values())
    assert found.noise.value == pytest.approx(math.sqrt(within_arms) / mean)
    assert found.ratio == pytest.approx(found.signal.value / found.paired_noise.value)
    # A standard deviation by chi-square, 12 degrees of freedom; a range by Tukey's, which its p-value agrees with.
    ends = [math.sqrt(residual * 12 / stats.chi2.ppf(at, 12)) / mean for at in (0.975, 0.025)]
    assert [found.paired_noise.low, found.paired_noise.high] == pytest.approx(ends)
    half = stats.studentized_range.ppf(0.95, 4, 12) * math.sqrt(residual / 5) / mean
    assert [found.signal.low, found.signal.high] == pytest.approx(
        [found.signal.value - half, found.signal.value + half]
    )


def test_the_signal_begins_at_zero_where_tukeys_test_shows_no_difference() -> None:
    for seed in range(20):
        values = study(np.random.default_rng(seed), [0.0, 0.1, 0.2], 3)
        found = signal_and_noise(values)
        assert found is not None
        assert found.signal is not None
        assert found.paired_noise is not None
        q = found.signal.value / found.paired_noise.value * math.sqrt(3)
        assert found.differs == (stats.studentized_range.sf(q, 3, 4) < 0.05)


def test_no_number_is_given_where_it_means_nothing() -> None:
    one_seed = signal_and_noise({arm: {0: 1.0 + at} for at, arm in enumerate("abc")})
    assert one_seed is not None
    assert (one_seed.noise, one_seed.paired_noise, one_seed.ratio, one_seed.differs) == (None, None, None, None)
    assert one_seed.signal is not None
    assert one_seed.signal.value == pytest.approx(1.0)
    assert one_seed.signal.low is None
    two_arms = signal_and_noise({"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 2.5}})
    assert two_arms is not None
    assert (two_arms.signal, two_arms.ratio) == (None, None)
    assert two_arms.noise is not None
    around_zero = signal_and_noise({arm: {0: -0.1, 1: 0.05 * at} for at, arm in enumerate("abc")})
    assert around_zero is not None
    assert (around_zero.signal, around_zero.noise) == (None, None)
    assert signal_and_noise({"a": {}}) is None


def test_arms_that_share_their_runs_count_once_and_arms_with_one_seed_are_left_out() -> None:
    values = study(np.random.default_rng(1), [0.0, 0.3, 0.6], 4)
    more = {**values, "same": values["1"], "lonely": {0: 99.0}}
    assert signal_and_noise(more) == signal_and_noise(values)


def test_checkpoint_noise_is_the_scatter_about_a_line_over_the_last_quarter() -> None:
    random = np.random.default_rng(0)
    course = [(step, 5.0 - 0.01 * step + float(random.normal(0, 0.1))) for step in range(0, 101, 5)]
    last = last_validations(course)
    assert [step for step, _ in last] == [80, 85, 90, 95, 100]
    assert last_validations(course[:1]) == course[:1]
    assert last_validations([(10, 3.0), (20, 2.0)]) == [(20, 2.0)]
    x, y = np.array(last).T
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    assert checkpoint_noise([last, last[:2]]) == pytest.approx(math.sqrt((residual**2).sum() / 3) / y.mean())
    assert checkpoint_noise([last[:2]]) is None


def test_decision_accuracy_is_kendalls_tau_as_a_share_of_pairs() -> None:
    random = np.random.default_rng(0)
    for arms in (3, 6, 11):
        small, large = random.normal(size=(2, arms))
        found = decision_accuracy(dict(enumerate_names(small)), dict(enumerate_names(large)))
        assert found is not None
        assert found.pairs == len([*itertools.combinations(range(arms), 2)])
        assert found.share.value == pytest.approx((1 + stats.kendalltau(small, large).statistic) / 2)
    tied = decision_accuracy({"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 3, "d": 0})
    assert tied is not None
    assert tied.share.value == pytest.approx((0.5 + 1 + 1) / 3)
    assert decision_accuracy({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}) is None


def enumerate_names(values: np.ndarray) -> list[tuple[str, float]]:
    return [(str(at), float(x)) for at, x in enumerate(values)]


@pytest.mark.parametrize("scenario", ["alike", "seeds move all arms by 3 x", "no arm differs"])
def test_intervals_of_signal_and_noise_cover_where_arms_scatter_alike(scenario: str) -> None:
    """300 sizes each: the paired noise is exact, the signal holds for all pairs, the noise is Satterthwaite's."""
    random, count, hits = np.random.default_rng(5), 300, np.zeros(3)
    for at in range(count):
        arms, seeds = ((3, 2), (5, 3), (4, 5))[at % 3]
        found, *truths = coverage_noise.simulated(random, arms, seeds, **coverage_noise.SCENARIOS[scenario])
        found = (found.signal, found.noise, found.paired_noise)
        hits += [coverage_noise.contains(each, truth) for each, truth in zip(found, truths, strict=True)]
    assert (hits / count >= 0.95 - within(0.95, count)).all(), hits / count


@pytest.mark.parametrize("kind", [0.0, 0.8, 0.95, "a third reversed"])
def test_the_interval_of_a_decision_accuracy_covers_the_chance_of_other_pairs(kind: float | str) -> None:
    random, count = np.random.default_rng(7), 300
    truth = coverage_noise.true_share(kind)
    found = [coverage_noise.decided(random, kind, (3, 5, 8, 25)[at % 4]) for at in range(count)]
    covered = sum(each.low <= truth <= each.high for each in found) / count
    assert covered >= 0.95 - within(0.95, count)
    assert statistics.fmean(each.value for each in found) == pytest.approx(truth, abs=0.04)
