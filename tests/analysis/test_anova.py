"""Factors of several levels: judged by statsmodels' analysis of variance, by planted effects and by false alarms."""

from __future__ import annotations

import itertools

import numpy as np
import pandas
import pytest
from scipy import stats
from simulated import study, within
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.layouts import factor_layouts, layouts
from lit_llm.analysis.anova import FactorLayout, anova, judged_terms
from lit_llm.analysis.comparison import RunResult, compare
from lit_llm.analysis.correction import Correction
from lit_llm.report.anova import anova_parts

LEVELS = {"a": ["x", "y", "z"], "b": ["0", "1"], "c": ["p", "q", "r"]}


def layout(*names: str) -> FactorLayout:
    factors = {name: LEVELS[name] for name in names}
    places = itertools.product(*(range(len(labels)) for labels in factors.values()))
    return FactorLayout("g", factors, {str(number): place for number, place in enumerate(places)})


def alike(of: FactorLayout, random: np.random.Generator, effects: list[float] | None = None):  # type: ignore[no-untyped-def]
    """A study whose arms pass for scattering alike, as about 19 of 20 do."""
    while True:
        values = study(random, effects or [0.0] * len(of.arms), seeds=4)
        if anova(of, values).terms[0].f is not None:
            return values


@pytest.mark.parametrize("names", ["a", "ab", "ac", "abc"])
def test_f_and_p_are_those_of_statsmodels(names: str) -> None:
    """Seeds as blocks; all interactions are in the model, also those that are not shown."""
    of, random = layout(*names), np.random.default_rng(0)
    values = alike(of, random, [*random.normal(0, 0.1, len(of.arms))])
    rows = [
        {"seed": seed, "y": y, **dict(zip(names, of.arms[arm], strict=True))}
        for arm, by_seed in values.items()
        for seed, y in by_seed.items()
    ]
    formula = f"y ~ C(seed) + {'*'.join(f'C({name})' for name in names)}"
    judge = anova_lm(ols(formula, pandas.DataFrame(rows)).fit(), typ=2)
    found = anova(of, values)
    assert found.residual_degrees == judge.loc["Residual", "df"]
    assert len(found.terms) == len(names) + len(names) * (len(names) - 1) // 2
    between = judge.loc[[name for name in judge.index if name not in ("Residual", "C(seed)")], "sum_sq"].sum()
    for term in found.terms:
        row = judge.loc[":".join(f"C({name})" for name in term.factors)]
        assert (term.degrees, term.f, term.p) == pytest.approx((row["df"], row["F"], row["PR(>F)"]))
        assert term.share == pytest.approx(row["sum_sq"] / between)


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
    assert np.mean(hits) == pytest.approx(0.95, abs=within(0.95, 400))


@pytest.mark.parametrize(
    ("correction", "method"), [("none", None), ("holm", "holm"), ("fdr_bh", "fdr_bh"), ("dunnett", "holm")]
)
def test_terms_and_levels_are_corrected_as_statsmodels_does_each_as_one_family(
    correction: Correction, method: str | None
) -> None:
    """Of two groups; a level's own p is of t, its difference by its standard error."""
    of, random = layout("a", "b"), np.random.default_rng(5)
    tables = [anova(of, alike(of, random, [0.0, 0.0, 0.0, 0.15, 0.1, 0.2])) for _ in range(2)]
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


def test_factors_without_effect_are_found_in_one_of_twenty_studies() -> None:
    of, random = layout("a", "b"), np.random.default_rng(2)
    p = [[term.p for term in anova(of, alike(of, random)).terms] for _ in range(400)]
    assert np.mean(np.array(p) < 0.05, axis=0) == pytest.approx([0.05] * 3, abs=within(0.05, 400))


def test_without_a_common_scatter_there_is_no_f_and_the_table_says_so() -> None:
    of, random = layout("a", "b"), np.random.default_rng(3)
    wild = study(random, [0.0] * 6, seeds=8)
    wild["2"] = {seed: value + float(random.normal(0, 10)) for seed, value in wild["2"].items()}
    found = anova(of, wild)
    assert [term.f for term in found.terms] == [None] * 3
    assert any("do not scatter alike" in note for note in found.notes)
    assert anova(of, {arm: {0: 1.0} for arm in of.arms}).terms[0].f is None
    del wild["1"]
    assert anova(of, wild).notes == ("no F tests yet: they need a seed for which all 6 arms have a value",)


@pytest.mark.parametrize(("levels", "two_level", "several"), [("[head, none]", 1, 0), ("[head, none, concat]", 0, 1)])
def test_a_factorial_is_reported_by_effects_or_by_f_tests(  # type: ignore[no-untyped-def]
    levels: str, two_level: int, several: int, tmp_path
) -> None:
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
    tables = compare(runs, "m", factor_layouts=factor_layouts(ablation)).anova
    assert len(tables) == several
    for table in tables:
        tests, against_first = anova_parts(table, "m", named=False)
        assert [row[0] for row in tests.rows] == ["output_norm", "qkv_norm", "output_norm × qkv_norm"]
        assert [row[1] for row in against_first.rows] == ["head → none", "head → concat", "q+k+v → none"]
