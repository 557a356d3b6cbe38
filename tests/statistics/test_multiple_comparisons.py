"""Corrections for many comparisons: judged by statsmodels, scipy, Dunnett's table, and by false alarms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.statistics.baselines import Noise, differences_from_baselines
from lit_llm.statistics.multiple_comparisons import Correction, dunnett_critical, dunnett_p, fdr_bh, holm
from lit_llm.statistics.verdicts import Judgement, judgements
from lit_llm.studies.schema import Compare
from tests.statistics.simulated import study, within

NLL = "val/target_nll"


@pytest.mark.parametrize(("ours", "method"), [(holm, "holm"), (fdr_bh, "fdr_bh")])
def test_adjusted_p_values_are_those_of_statsmodels(ours, method: str) -> None:
    for seed in range(10):
        p = np.random.default_rng(seed).beta(0.4, 3, 1 + 2 * seed)
        assert [*ours(dict(enumerate(p))).values()] == pytest.approx(multipletests(p, method=method)[1])
    assert ours({}) == {}


@pytest.mark.parametrize("arms", [1, 2, 5])
def test_dunnetts_p_is_scipys(arms: int) -> None:
    """Its one-way layout has other degrees of freedom than a block over seeds; the distribution of |t| is the same."""
    random, runs = np.random.default_rng(arms), 6
    control, *others = random.normal([0, *np.linspace(0.2, 1.5, arms)], 1, (runs, arms + 1)).T
    judge = stats.dunnett(*others, control=control, rng=np.random.default_rng(0))
    degrees = (arms + 1) * (runs - 1)
    ours = [dunnett_p(t, arms, degrees) for t in judge.statistic]
    assert ours == pytest.approx(judge.pvalue, abs=2e-4)  # scipy integrates by Monte Carlo


def test_dunnetts_critical_values_are_those_of_his_table() -> None:
    """Dunnett 1964, Biometrics 20, two-sided 5%, ten degrees of freedom, one to four arms beside the control."""
    assert [round(dunnett_critical(0.05, arms, 10), 2) for arms in (1, 2, 3, 4)] == [2.23, 2.57, 2.76, 2.89]


def judged(values: dict[str, dict[int, float]], correction: Correction) -> dict[str, Judgement]:
    baselines = dict.fromkeys(values, "0")
    noise = Noise("pooled" if correction == "dunnett" else "moderated")
    return judgements(differences_from_baselines(values, baselines, noise), baselines, NLL, correction)


@pytest.mark.parametrize(
    ("correction", "low", "high"),
    [("none", 0.08, 0.30), ("holm", 0.01, 0.05), ("fdr_bh", 0.01, 0.05), ("dunnett", 0.04, 0.05)],
)
def test_the_chance_of_any_false_effect_among_five_arms(correction: Correction, low: float, high: float) -> None:
    """Five arms that do not differ from the baseline, three seeds: after a correction 5% of the studies find any."""
    random, count = np.random.default_rng(7), 1000
    alarms = []
    for _ in range(count):
        found = judged(study(random, [0.0] * 6, seeds=3), correction)
        alarms.append(any(row.p is not None and row.p < 0.05 for row in found.values()))
    assert low - within(low, count) < np.mean(alarms) < high + within(high, count)


def test_dunnetts_intervals_cover_all_true_differences_at_once() -> None:
    random, count, effects = np.random.default_rng(8), 1000, [0.0, 0.1, -0.3, 0.0, 0.5]
    covered = []
    for _ in range(count):
        found = judged(study(random, effects, seeds=4), "dunnett")
        covered.append(all(covers(found[str(arm)], effects[arm]) for arm in range(1, 5)))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def covers(found: Judgement, truth: float) -> bool:
    low, high = found.difference.low, found.difference.high
    assert low is not None
    assert high is not None
    return low <= truth <= high


def test_two_baselines_share_the_five_percent() -> None:
    """A table with two families of two arms: the chance of any false effect in it is 5% all the same."""
    random, count, alarms = np.random.default_rng(9), 1000, 0
    baselines = {"a0": "a0", "a1": "a0", "a2": "a0", "b0": "b0", "b1": "b0", "b2": "b0"}
    for _ in range(count):
        pair = [study(random, [0.0] * 3, seeds=4) for _ in "ab"]
        values = {f"{name}{arm}": v for name, part in zip("ab", pair, strict=True) for arm, v in part.items()}
        found = judgements(differences_from_baselines(values, baselines, Noise("pooled")), baselines, NLL, "dunnett")
        alarms += any(row.verdict != "undecided" for row in found.values())
    assert alarms / count == pytest.approx(0.05, abs=within(0.05, count))


@pytest.mark.parametrize("correction", ["holm", "fdr_bh"])
def test_intervals_of_a_correction_hold_at_once(correction: Correction) -> None:
    """Each of three intervals is that of 1 − 5%/3 (Bonferroni), judged by scipy's t-test of two arms alone."""
    values = study(np.random.default_rng(1), [0.0, 0.1, 0.2, 0.3], seeds=5)
    baselines = dict.fromkeys(values, "0")
    found = judgements(differences_from_baselines(values, baselines, Noise("paired")), baselines, NLL, correction)["1"]
    deltas = [values["1"][seed] - values["0"][seed] for seed in range(5)]
    interval = stats.ttest_1samp(deltas, 0).confidence_interval(1 - 0.05 / 3)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_dunnetts_procedure_is_refused_without_its_assumption() -> None:
    with pytest.raises(InputError, match="variance: pooled"):
        validate(Compare, tree({"correction": "dunnett"}))
