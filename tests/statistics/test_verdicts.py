"""Verdicts and the smallest difference that seeds can show: judged by statsmodels and by simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import nctdtr
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.statistics.baselines import differences_from_baselines
from lit_llm.statistics.comparison import COLUMNS, compare
from lit_llm.statistics.multiple_comparisons import two_sided_critical
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.verdicts import LARGE, Judgement, detectable_ratio, judgements
from lit_llm.studies.schema import Compare
from tests.statistics.simulated import study, within

NLL = "val/target_nll"
BASELINES = {"0": "0", "1": "0"}


def pair(values: dict[str, dict[int, float]], margin: float | None = None, metric: str = NLL) -> Judgement:
    return judgements(differences_from_baselines(values, BASELINES), BASELINES, metric, margin=margin)["1"]


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_the_smallest_effect_is_that_of_statsmodels(seeds: int) -> None:
    """Its effect size is in standard deviations of the paired differences."""
    values = study(np.random.default_rng(seeds), [0.0, 0.1], seeds)
    deviation = np.std([values["1"][seed] - values["0"][seed] for seed in range(seeds)], ddof=1)
    size = TTestPower().solve_power(nobs=seeds, alpha=0.05, power=0.8, alternative="two-sided")
    assert pair(values).detectable == pytest.approx(size * deviation, rel=1e-4)


@pytest.mark.parametrize("degrees", [1, 1.33, 2.4, 7.9, 50.5])
@pytest.mark.parametrize("level", [0.05, 0.05 / 20, 0.05 / 1000])
def test_the_ratio_is_the_one_of_the_noncentral_t(degrees: float, level: float) -> None:
    """With it as noncentrality, t exceeds its critical value with 80% probability."""
    critical = two_sided_critical(level, degrees)
    assert nctdtr(degrees, detectable_ratio(critical, degrees), critical) == pytest.approx(0.2, abs=2e-5)


@pytest.mark.parametrize("degrees", [1, 1.7, 3])
def test_the_ratio_has_no_step_where_its_limit_takes_over(degrees: float) -> None:
    below, above = (detectable_ratio(LARGE * by, degrees) for by in (1 - 1e-9, 1 + 1e-9))
    assert above == pytest.approx(below, rel=5e-5)


def test_an_effect_of_that_size_is_found_in_four_of_five_studies() -> None:
    random, seeds, count = np.random.default_rng(0), 4, 1000
    error = 0.1 * 2**0.5 / seeds**0.5  # of a difference of two arms
    effect = error * detectable_ratio(two_sided_critical(0.05, seeds - 1), seeds - 1)
    found = [pair(study(random, [0.0, effect], seeds)).verdict == "worse" for _ in range(count)]
    assert np.mean(found) == pytest.approx(0.8, abs=within(0.8, count))


@pytest.mark.parametrize("effect", [0.0, 0.05, 0.15])
def test_no_difference_larger_than_the_margin_is_said_where_statsmodels_equivalence_test_says_so(effect: float) -> None:
    random, margin, said = np.random.default_rng(1), 0.2, set()
    for _ in range(200):
        values = study(random, [0.0, effect], seeds=4)
        p, *_ = ttost_paired(np.array([*values["1"].values()]), np.array([*values["0"].values()]), -margin, margin)
        verdict = pair(values, margin).verdict
        assert (verdict == "no difference larger than 0.2") == (p < 0.05)
        said.add(verdict)
    assert len(said) > 1


@pytest.mark.parametrize("effect", [0.2, -0.2])
def test_a_difference_as_large_as_the_margin_is_denied_in_one_of_twenty_studies(effect: float) -> None:
    random, count = np.random.default_rng(2), 1000
    denied = [pair(study(random, [0.0, effect], 5), margin=0.2).verdict.startswith("no diff") for _ in range(count)]
    assert np.mean(denied) <= 0.05 + within(0.05, count)


def close(mean: float, scatter: float, seeds: int = 5) -> dict[str, dict[int, float]]:
    """Two arms of which the differences have exactly this mean and this standard deviation."""
    deltas = np.linspace(-1, 1, seeds)
    deltas = mean + scatter * deltas / np.std(deltas, ddof=1)
    return {"0": dict.fromkeys(range(seeds), 3.0), "1": {seed: 3.0 + float(d) for seed, d in enumerate(deltas)}}


@pytest.mark.parametrize(
    ("metric", "mean", "scatter", "margin", "verdict"),
    [
        (NLL, -0.5, 0.1, None, "better"),
        (NLL, 0.5, 0.1, None, "worse"),
        (NLL, 0.01, 0.1, None, "undecided"),
        (NLL, 0.01, 0.1, 0.02, "not enough seeds"),
        (NLL, 0.01, 0.1, 0.2, "no difference larger than 0.2"),
        (NLL, 0.05, 0.01, 0.2, "no difference larger than 0.2"),  # no zero, and of no matter
        (NLL, 0.5, 0.1, 0.2, "worse"),
        ("eval/tasks/boolq/acc", 0.5, 0.1, None, "better"),
        ("eval/tasks/boolq/acc", -0.5, 0.1, None, "worse"),
        ("throughput/tokens_per_second", 0.5, 0.1, None, "better"),
        ("val/masked_nll", -0.5, 0.1, None, "better"),
        ("stability/max_grad_norm", -0.5, 0.1, None, "lower"),
    ],
)
def test_verdicts(metric: str, mean: float, scatter: float, margin: float | None, verdict: str) -> None:
    assert pair(close(mean, scatter), margin, metric).verdict == verdict


@pytest.mark.parametrize(("margin", "verdict"), [(None, "undecided"), (0.1, "not enough seeds")])
def test_one_seed_decides_nothing(margin: float | None, verdict: str) -> None:
    found = pair({"0": {0: 3.0}, "1": {0: 1.0}}, margin)
    assert (found.p, found.detectable, found.verdict) == (None, None, verdict)


def test_an_arm_that_is_its_baseline_to_the_last_bit_is_no_different() -> None:
    same = {"0": {0: 3.0, 1: 4.0}, "1": {0: 3.0, 1: 4.0}}
    assert (pair(same).p, pair(same).verdict) == (1.0, "undecided")
    assert pair(same, margin=0.1).verdict == "no difference larger than 0.1"


def results() -> list[RunResult]:
    values = study(np.random.default_rng(3), [0.0, 0.5, 0.0], seeds=4)
    return [
        RunResult(arm, "0", seed, "done", {"metrics": {NLL: v}, "parameters": 1, "flops": 1.0, "provenance": {}})
        for arm, by_seed in values.items()
        for seed, v in by_seed.items()
    ]


def test_the_table_says_for_how_many_comparisons_its_intervals_hold() -> None:
    plain = compare(results(), NLL)
    assert any("not adjusted for 2 comparisons" in note for note in plain.notes)
    assert not {"p", "verdict"} & {*comparison_tables(plain)[0].head}
    asked = compare(results(), NLL, procedure=Procedure("pooled", "dunnett", 0.4))
    assert any("for 2 comparisons by Dunnett's method" in note for note in asked.notes)
    head, rows = comparison_tables(asked)[0].head, comparison_tables(asked)[0].rows
    assert [row[head.index("verdict")] for row in rows] == ["", "worse", "no difference larger than 0.4"]
    pooled = compare(results(), NLL, procedure=Procedure("pooled"))
    for arm in ("1", "2"):
        narrow, wide = (next(row.difference for row in table.rows if row.arm == arm) for table in (pooled, asked))
        assert narrow is not None
        assert wide is not None
        assert narrow.low is not None
        assert wide.low is not None
        assert wide.low < narrow.low


def test_the_numbers_stand_in_the_csv() -> None:
    _, *lines = compare(results(), NLL).csv().splitlines()
    row = dict(zip(COLUMNS, lines[1].split(","), strict=True))
    assert row["verdict"] == "worse"
    assert float(row["p"]) < 0.05 < float(row["detectable"])


@pytest.mark.parametrize("margin", [0, -0.1])
def test_a_margin_is_larger_than_zero(margin: float) -> None:
    with pytest.raises(InputError, match="margin"):
        validate(Compare, tree({"margin": margin}))
