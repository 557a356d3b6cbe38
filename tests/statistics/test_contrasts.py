"""Moderated intervals: the formula by hand, what they borrow and from whom, and their coverage however arms scatter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.contrasts import PRIOR_DEGREES, moderated
from lit_llm.statistics.paired import Difference
from tests.statistics.simulated import study, within


def differences(values: dict[str, dict[int, float]], variance: str = "moderated") -> dict[str, Difference]:
    found = block_differences(values, "0", Noise(variance))
    assert all(d is not None for d in found.values())
    return found


def test_the_interval_is_that_of_the_formula() -> None:
    """d = min(1, s0 / s2) / 3, V = (d s0 + ν s2) / (d + ν), t with d + ν degrees, computed here from the values."""
    values = study(np.random.default_rng(0), [0.0, 0.1, 0.2, 0.3], seeds=4)
    deltas = {arm: np.array([values[arm][s] - values["0"][s] for s in range(4)]) for arm in "123"}
    s2, s0 = deltas["1"].var(ddof=1), (deltas["2"].var(ddof=1) + deltas["3"].var(ddof=1)) / 2
    lent = min(1.0, s0 / s2) / 3
    variance = (lent * s0 + 3 * s2) / (lent + 3)
    half = stats.t.ppf(0.975, 3 + lent) * math.sqrt(variance / 4)
    found = differences(values)["1"]
    assert found.degrees == pytest.approx(3 + lent)
    assert (found.low, found.high) == pytest.approx((deltas["1"].mean() - half, deltas["1"].mean() + half))


def test_two_arms_alone_have_the_paired_t() -> None:
    values = study(np.random.default_rng(1), [0.0, 0.1], seeds=3)
    assert differences(values) == differences(values, "paired")


def test_arms_lend_once_however_many_share_their_runs_and_the_baselines_own_runs_lend_nothing() -> None:
    values = study(np.random.default_rng(2), [0.0, 0.1, 0.2], seeds=3)
    found = differences(values | {"twin": values["2"], "same": values["0"]})
    assert found["1"] == differences(values)["1"]
    assert found["2"] == found["twin"] == differences(values)["2"]
    assert (found["same"].low, found["same"].high) == (0.0, 0.0)


def test_a_missing_run_of_another_arm_changes_an_interval_by_next_to_nothing() -> None:
    """The others lend by their degrees of freedom; nothing is taken from everybody."""
    values = study(np.random.default_rng(3), [0.0] * 6, seeds=3)
    whole = differences(values)["1"]
    del values["5"][2]
    assert differences(values)["1"].half_width() == pytest.approx(whole.half_width(), rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 10.0, 100.0])
def test_coverage_is_93_percent_or_more_however_much_more_an_arm_scatters_than_the_others(
    seeds: int, ratio: float
) -> None:
    """By the t statistic of 40,000 samples against seven calm arms, in one array; the standard error is 0.0013."""
    random, count = np.random.default_rng(4), 40_000
    mean = random.normal(0, ratio / math.sqrt(seeds), count)
    own = ratio**2 * random.chisquare(seeds - 1, count) / (seeds - 1)
    others = random.chisquare(7 * (seeds - 1), count) / (7 * (seeds - 1))
    variance, degrees = moderated(own, seeds - 1, others)
    covered = np.abs(mean) <= stats.t.ppf(0.975, degrees) * np.sqrt(variance / seeds)
    assert covered.mean() >= 0.93 - within(0.93, count)


def test_the_formula_is_the_same_for_numbers_and_for_arrays() -> None:
    assert moderated(2.0, 2, None) == (2.0, 2)
    one = moderated(2.0, 2, 0.5)
    many = moderated(np.array([2.0, 0.0, 1.0]), 2, np.array([0.5, 1.0, np.nan]))
    assert one == pytest.approx((many[0][0], many[1][0]))
    assert (many[0][1], many[1][1]) == pytest.approx((PRIOR_DEGREES / (2 + PRIOR_DEGREES), 2 + PRIOR_DEGREES))
    assert (many[0][2], many[1][2]) == (1.0, 2.0)


@pytest.mark.parametrize("scenario", ["iid", "family", "baseline"])
def test_differences_cover_where_pooling_does_not(scenario: str) -> None:
    """Eight arms, three seeds: half of them of a family that reacts to a seed in its own way, or a noisy baseline."""
    random, count, hits = np.random.default_rng(5), 250, {"moderated": 0, "pooled": 0}
    for _ in range(count):
        values = study(random, [0.0] * 8, seeds=3)
        own, noise = random.normal(0, 0.17, (2, 3)), random.normal(0, 0.3, 3)
        for arm, by_seed in values.items():
            for seed in by_seed:
                by_seed[seed] += own[int(int(arm) > 3), seed] * (scenario == "family")
                by_seed[seed] += noise[seed] * (scenario == "baseline" and arm == "0")
        for how in hits:
            d = differences(values, how)["7"]
            assert d.low is not None
            assert d.high is not None
            hits[how] += d.low <= 0 <= d.high
    assert hits["moderated"] / count >= 0.93 - within(0.93, count)
    assert (hits["pooled"] / count < 0.9) == (scenario != "iid")
