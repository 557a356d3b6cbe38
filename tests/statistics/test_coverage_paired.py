"""The simulation of paired procedures: against scipy, statsmodels and loops, and what it reproduces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lit_llm.statistics.mixed_model import mixed_differences
from tests.statistics.simulated import within

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage_paired.py"
spec = importlib.util.spec_from_file_location("coverage_paired", SCRIPT)
assert spec is not None
assert spec.loader is not None
coverage_paired = sys.modules["coverage_paired"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage_paired)

ONE_FAMILY = np.zeros(6, int)


def studies(missing: float = 0.0, number: int = 0, family: float = 0.0) -> np.ndarray:
    """40 studies of 6 arms, the second half a family of its own, and 5 seeds."""
    random = np.random.default_rng(number)
    y = random.normal(size=(40, 6, 5)) + 2 * random.normal(size=(40, 1, 5))
    y += np.repeat(random.normal(0, family**0.5, (40, 2, 5)), 3, axis=1)
    y[random.random(y.shape) < missing] = np.nan
    return y


def deltas(study: np.ndarray, arm: int) -> np.ndarray:
    d = study[arm] - study[0]
    return d[np.isfinite(d)]


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_paired_t_is_scipys(missing: float) -> None:
    y = studies(missing)
    found, lonely = coverage_paired.paired(y, ONE_FAMILY), 0
    half = coverage_paired.alone(5, found.degrees) * found.error
    for at, study in enumerate(y):
        for arm in range(1, 6):
            d = deltas(study, arm)
            if len(d) < 2:
                lonely += 1
                assert np.isnan(half[at, arm - 1])
                continue
            low, high = stats.ttest_1samp(d, 0).confidence_interval()
            assert found.mean[at, arm - 1] + half[at, arm - 1] * np.array([-1, 1]) == pytest.approx([low, high])
    assert (lonely > 0) == (missing > 0)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_moderated_variance_adds_up_to_a_third_of_a_degree_from_the_other_differences(missing: float) -> None:
    y = studies(missing)
    found = coverage_paired.moderated(y, ONE_FAMILY)
    for at, study in enumerate(y):
        variances = {arm: (len(d) - 1, d.var(ddof=1)) for arm in range(1, 6) if len(d := deltas(study, arm)) > 1}
        for arm, (nu, s2) in variances.items():
            others = [v for other, v in variances.items() if other != arm]
            prior = sum(n * s for n, s in others) / sum(n for n, _ in others) if others else s2
            lent = min(1.0, prior / s2) / 3 if others else 0.0
            variance = (lent * prior + nu * s2) / (lent + nu) / (nu + 1)
            assert found.degrees[at, arm - 1] == pytest.approx(nu + lent)
            assert found.error[at, arm - 1] ** 2 == pytest.approx(variance)


@pytest.mark.parametrize("missing", [0.0, 0.2, 0.7])
def test_pooled_variance_is_that_of_least_squares_on_arms_and_seeds(missing: float) -> None:
    """With 70% missing, arms fall into groups that no seed links."""
    y = studies(missing)
    squares, degrees = coverage_paired.additive(y)
    for at, study in enumerate(y):
        arms, seeds = np.nonzero(np.isfinite(study))
        design = np.hstack([arms[:, None] == range(6), seeds[:, None] == range(5)]).astype(float)
        solution, _, rank, _ = np.linalg.lstsq(design, study[arms, seeds], rcond=None)
        residual = study[arms, seeds] - design @ solution
        assert degrees[at] == len(arms) - rank
        assert squares[at] == pytest.approx(residual @ residual, abs=1e-9)


def test_pooling_goes_by_scipys_bartlett_test() -> None:
    y = studies() * np.exp(np.random.default_rng(1).normal(0, 0.6, (40, 6, 1)))
    found, pooled = coverage_paired.pooled_after_bartlett(y, ONE_FAMILY), coverage_paired.pooled(y, ONE_FAMILY)
    alike = [stats.bartlett(*rows).pvalue >= 0.05 for rows in coverage_paired.residuals(y)]
    assert (found.degrees[:, 0] == pooled.degrees[:, 0]).tolist() == alike
    assert found.error[alike] == pytest.approx(pooled.error[alike])
    assert 5 < sum(alike) < 35


def test_the_closed_form_of_the_mixed_model_is_reml() -> None:
    """Where the seed's luck is not estimated as zero; a reaction of families of zero included."""
    families, compared = np.array([0, 0, 0, 1, 1, 1]), set()
    y = studies(family=0.3)[:20]
    found = coverage_paired.mixed(y, families)
    for at, study in enumerate(y):
        values = {f"a{arm}": dict(enumerate(map(float, row))) for arm, row in enumerate(study)}
        judge = mixed_differences(values, "a0", {f"a{arm}": str(families[arm]) for arm in range(6)})
        for arm in range(1, 6):
            one = judge[f"a{arm}"]
            assert one is not None
            if one.components.seed > 0:
                ours = (found.mean[at, arm - 1], found.error[at, arm - 1], found.degrees[at, arm - 1])
                assert ours == pytest.approx((one.mean, one.error, one.degrees), rel=1e-4)
                compared.add((families[arm], one.components.family_seed == 0))
    assert len(compared) == 4


def test_corrections_are_those_of_statsmodels_and_leave_missing_tests_out() -> None:
    p = np.random.default_rng(0).beta(0.4, 3, (8, 7))
    p[np.random.default_rng(1).random(p.shape) < 0.2] = np.nan
    for ours, method in ((coverage_paired.holm, "holm"), (coverage_paired.benjamini_hochberg, "fdr_bh")):
        for row, found in zip(p, ours(p), strict=True):
            known = np.isfinite(row)
            assert found[known] == pytest.approx(multipletests(row[known], method=method)[1])
            assert np.isnan(found[~known]).all()


def test_critical_values_from_the_table_are_exact() -> None:
    degrees = np.random.default_rng(0).uniform(1, 60, 3000)
    assert coverage_paired.alone(7, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-4)


def test_scenarios_scatter_as_they_say() -> None:
    every = {scenario.name: scenario for scenario in coverage_paired.scenarios([8], [4])}
    assert len({scenario.name for scenario in every.values()}) == 36

    def variances(name: str) -> np.ndarray:
        y = coverage_paired.simulate(every[name], 4000, np.random.default_rng(0))
        return np.nanvar(y[:, 1:] - y[:, :1], axis=(0, 2))

    for name, expected in {
        "iid": [2] * 7,
        "two families, variance 3": [2] * 3 + [8] * 4,
        "an arm of another family": [2] * 6 + [4],
        "a baseline of another family": [4] * 7,
        "an arm 3 x as wide": [2] * 6 + [10],
        "a baseline 3 x as wide": [10] * 7,
        "iid, 10% missing": [2] * 7,
    }.items():
        assert variances(name) == pytest.approx(expected, rel=0.06), name
    tails = coverage_paired.simulate(every["t3 tails"], 4000, np.random.default_rng(0))
    assert stats.kurtosis((tails[:, 1:] - tails[:, :1]).ravel()) > 1
    missing = coverage_paired.simulate(every["iid, 10% missing"], 4000, np.random.default_rng(0))
    assert np.isnan(missing).mean() == pytest.approx(0.1, abs=0.005)
    stopped = coverage_paired.simulate(every["iid, stopped arms"], 1, np.random.default_rng(0))
    assert np.isfinite(stopped[0]).sum(axis=1).tolist() == [4, 2] * 4


@pytest.mark.slow
def test_what_holds_in_every_scenario_and_what_does_not() -> None:
    """The worst of 66 scenarios; the smallest of so many estimates lies about three standard errors below the truth."""
    rows = coverage_paired.coverage_table(4000, 0, coverage_paired.scenarios((3, 8), (3, 5)))
    slack = within(0.95, 4000) * 4 / 3

    def worst(procedure: str, figure: str, seeds: int, by=min) -> float:
        values = [
            row[figure] for row in rows
            if row["procedure"] == procedure and row["seeds"] == seeds and not row["harsh"] and row[figure] is not None
        ]  # fmt: skip
        return float(by(values))

    for seeds in (3, 5):
        assert worst("paired t", "coverage", seeds) > 0.95 - slack
        assert worst("moderated", "coverage", seeds) > 0.93 - slack
        for name in ("pooled", "pooled after Bartlett", "mixed"):
            assert worst(name, "coverage", seeds) < 0.87
        for name in ("Holm: paired t", "Holm: moderated"):
            assert worst(name, "fwer", seeds, max) < 0.05 + slack
        assert worst("BH: moderated", "fdr", seeds, max) < 0.05 + slack
        assert worst("Holm: mixed", "fwer", seeds, max) > 0.15
        assert worst("simultaneous: Dunnett", "fwer", seeds, max) > 0.15
    iid = {row["procedure"]: row for row in rows if row["scenario"] == "iid" and (row["arms"], row["seeds"]) == (8, 3)}
    assert iid["moderated"]["width"] == pytest.approx(0.94, abs=0.02)
    assert iid["moderated"]["power"] > iid["paired t"]["power"]
