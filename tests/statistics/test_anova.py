"""Factors of several levels: judged by statsmodels' analysis of variance, by planted effects and by false alarms."""

from __future__ import annotations

import itertools

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests

from lit_llm.report.tables.anova import anova_tables
from lit_llm.statistics.anova import FactorLayout, anova, judged_terms
from lit_llm.statistics.comparison import Design, compare
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.run_results import RunResult
from lit_llm.studies.estimable_effects import factor_layouts, layouts
from lit_llm.studies.load import load_study
from tests.statistics.simulated import study, within

LEVELS = {"a": ["x", "y", "z"], "b": ["0", "1"], "c": ["p", "q", "r"]}


def layout(*names: str) -> FactorLayout:
    factors = {name: LEVELS[name] for name in names}
    places = itertools.product(*(range(len(labels)) for labels in factors.values()))
    return FactorLayout("g", factors, {str(number): place for number, place in enumerate(places)})


@pytest.mark.parametrize("names", ["a", "ab", "ac", "abc"])
def test_f_is_that_of_statsmodels_repeated_measures(names: str) -> None:
    """Seeds are subjects; the p-value is that of F with both degrees of freedom scaled by the printed factor."""
    of, random = layout(*names), np.random.default_rng(0)
    values = study(random, [*random.normal(0, 0.1, len(of.arms))], seeds=4)
    rows = [
        {"seed": seed, "y": y, **dict(zip(names, of.arms[arm], strict=True))}
        for arm, by_seed in values.items()
        for seed, y in by_seed.items()
    ]
    judge = AnovaRM(pandas.DataFrame(rows), "y", "seed", within=[*names]).fit().anova_table
    found = anova(of, values)
    assert len(found.terms) == len(names) + len(names) * (len(names) - 1) // 2
    for term in found.terms:
        row = judge.loc[":".join(term.factors)]
        assert (term.degrees, term.error_degrees, term.f) == pytest.approx(
            (row["Num DF"], row["Den DF"], row["F Value"])
        )
        scaled = stats.f.sf(term.f, term.sphericity * term.degrees, term.sphericity * term.error_degrees)
        assert term.p == pytest.approx(scaled)
        if term.degrees == 1:
            assert term.p == pytest.approx(row["Pr > F"])


def test_the_factor_of_greenhouse_and_geisser_is_that_of_the_contrasts_covariance() -> None:
    """(tr S)² / (k tr S²) of the k orthonormal contrasts of one factor's level means (Greenhouse and Geisser 1959)."""
    of = layout("a", "b")
    values = study(np.random.default_rng(6), [0.0] * 6, seeds=5)
    (term, *_) = anova(of, values).terms
    table = np.array([[values[arm][seed] for arm in of.arms] for seed in range(5)]).reshape(5, 3, 2).mean(axis=2)
    contrasts = table @ np.array([[1, 1], [-1, 1], [0, -2]]) / np.sqrt([2, 6])
    covariance = np.cov(contrasts.T)
    assert term.sphericity == pytest.approx(np.trace(covariance) ** 2 / (2 * np.trace(covariance @ covariance)))


@pytest.mark.parametrize("wild", [1.0, 3.0, 10.0])
def test_a_factor_without_effect_is_found_in_one_of_twenty_studies_however_its_levels_scatter(wild: float) -> None:
    """One level of three moves with the seed more than the others do, as a family of models may."""
    of, random, count, alarms = layout("a", "b"), np.random.default_rng(2), 200, np.zeros(3)
    for _ in range(count):
        values = study(random, [0.0] * 6, seeds=4)
        own = random.normal(0, 0.1 * wild, 4)
        values = {
            arm: {seed: y + own[seed] * (of.arms[arm][0] == 2) for seed, y in by_seed.items()}
            for arm, by_seed in values.items()
        }
        alarms += [term.p < 0.05 for term in anova(of, values).terms]
    assert np.all(alarms / count <= 0.05 + within(0.05, count))


def test_levels_are_compared_with_the_first_over_all_others() -> None:
    """y lies 0.5 above x whatever b; the intervals cover that in 95% of the studies."""
    of, random, hits = layout("a", "b"), np.random.default_rng(1), []
    effects = [0.5 * (place[0] == 1) + 0.2 * place[1] for place in of.arms.values()]
    for _ in range(400):
        y = anova(of, study(random, effects, seeds=4)).levels[0]
        assert y.levels == ("x", "y")
        assert y.difference is not None
        assert y.difference.low is not None
        assert y.difference.high is not None
        hits.append(y.difference.low <= 0.5 <= y.difference.high)
    assert np.mean(hits) >= 0.95 - within(0.95, 400)


@pytest.mark.parametrize(
    ("correction", "method"), [("none", None), ("holm", "holm"), ("fdr_bh", "fdr_bh"), ("dunnett", "holm")]
)
def test_terms_and_levels_are_corrected_as_statsmodels_does_each_as_one_family(
    correction: Correction, method: str | None
) -> None:
    """Of two groups; a level's own p is of t, its difference by its standard error."""
    of, random = layout("a", "b"), np.random.default_rng(5)
    tables = [anova(of, study(random, [0.0, 0.0, 0.0, 0.35, 0.3, 0.4], seeds=4)) for _ in range(2)]
    terms = [term.p for table in tables for term in table.terms]
    levels = [
        2 * stats.t.sf(abs(d.mean / d.error), d.degrees)
        for table in tables
        for level in table.levels
        if (d := level.difference) is not None and d.error
    ]
    found = judged_terms(tables, "val/target_nll", correction)
    for plain, shown in (
        (terms, [x for table in found for x in table.terms]),
        (levels, [x for table in found for x in table.levels]),
    ):
        expected = plain if method is None else multipletests(plain, method=method)[1]
        assert [x.p for x in shown] == pytest.approx(expected)
        assert [x.verdict != "undecided" for x in shown] == [p < 0.05 for p in expected]
    assert {x.verdict for table in found for x in table.terms} == {"differs", "undecided"}


def test_one_seed_or_a_missing_arm_has_no_f_and_the_table_says_so() -> None:
    of = layout("a", "b")
    one = anova(of, {arm: {0: 1.0} for arm in of.arms})
    assert [term.f for term in one.terms] == [None] * 3
    assert "one complete seed has no F test; add seeds to see what is more than their scatter" in one.notes
    values = study(np.random.default_rng(3), [0.0] * 6, seeds=3)
    del values["1"]
    assert anova(of, values).notes == ("no F tests yet: they need a seed for which all 6 arms have a value",)


@pytest.mark.parametrize(("levels", "two_level", "several"), [("[head, none]", 1, 0), ("[head, none, concat]", 0, 1)])
def test_a_factorial_is_reported_by_effects_or_by_f_tests(levels: str, two_level: int, several: int, tmp_path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "study: s\nquestion: q\nextends: redllm-tiny\ngrid:\n  design: factorial\n  factors:\n"
        f"    model.attention.output_norm: {levels}\n    model.attention.qkv_norm: [[q, k, v], []]\n"
    )
    ablation = load_study(path)
    assert (len(layouts(ablation)), len(factor_layouts(ablation))) == (two_level, several)
    values = study(np.random.default_rng(0), [0.0] * len(ablation.arms), seeds=3)
    runs = [
        RunResult(arm.name, arm.baseline, seed, "done", {"metrics": {"m": v}, "parameters": 1, "flops": 1.0})
        for arm, by_seed in zip(ablation.arms, values.values(), strict=True)
        for seed, v in by_seed.items()
    ]
    tables = compare(runs, "m", Design(factor_layouts=factor_layouts(ablation))).anova
    assert len(tables) == several
    for table in tables:
        tests, against_first = anova_tables(table, "m", named=False)
        assert [row[0] for row in tests.rows] == ["output_norm", "qkv_norm", "output_norm × qkv_norm"]
        assert [row[1] for row in against_first.rows] == ["head → none", "head → concat", "q+k+v → none"]
