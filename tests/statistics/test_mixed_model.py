"""The mixed model: judged by R's lme4 and lmerTest, by statsmodels, by the textbook's block design, and by coverage."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from lit_llm.statistics.mixed_model import MixedEstimate, VarianceComponents, mixed_differences
from tests.r_judge import requires_r, run_r
from tests.statistics.simulated import within

Values = dict[str, dict[int, float]]
Families = dict[str, str]

CASES: dict[str, dict[str, float | int]] = {
    "balanced": {"family": 1.0},
    "one family": {"families": 1},
    "one family, missing runs": {"families": 1, "missing": 0.2},
    "missing runs": {"family": 1.0, "missing": 0.15, "number": 1},
    "half of the runs missing": {"family": 1.0, "missing": 0.45, "arms": 8, "seeds": 8},
    "unequal families": {"family": 2.0, "arms": 7, "second": 6},
    "one arm of another family": {"family": 2.0, "arms": 5, "second": 4},
    "three families": {"family": 1.0, "arms": 9, "families": 3, "missing": 0.1},
    "no reaction of families": {"family": 0.0, "number": 2},
    "no luck of seeds": {"family": 1.0, "luck": 0.0},
    "no luck, one family": {"families": 1, "luck": 0.0, "number": 3, "missing": 0.1},
    "nothing but residuals": {"luck": 0.0, "number": 4, "missing": 0.1},
    "two seeds": {"family": 1.0, "seeds": 2},
    "two arms": {"families": 1, "arms": 2},
    "small values": {"family": 1.0, "unit": 1e-4, "missing": 0.1},
    "much luck": {"family": 1.0, "luck": 50.0, "missing": 0.1},
    "many arms": {"family": 0.5, "arms": 16, "seeds": 6, "missing": 0.1},
}


def simulated(
    arms: int = 6,
    seeds: int = 5,
    families: int = 2,
    second: int = 0,
    family: float = 0.0,
    luck: float = 1.0,
    missing: float = 0.0,
    unit: float = 1.0,
    number: int = 0,
) -> tuple[Values, Families]:
    """A study of the model itself; second: the first arm of the second family, where they are not alike in size."""
    random = np.random.default_rng(number)
    belongs = [int(arm >= second) if second else arm * families // arms for arm in range(arms)]
    reaction, seed_luck = random.normal(0, family**0.5, (families, seeds)), random.normal(0, luck, seeds)
    y = 3.0 + 0.1 * np.arange(arms)[:, None] + seed_luck + reaction[belongs] + random.normal(0, 1, (arms, seeds))
    present = random.random((arms, seeds)) >= missing
    values = {
        f"arm{arm}": {seed: unit * float(y[arm, seed]) for seed in range(seeds) if present[arm, seed]}
        for arm in range(arms)
    }
    return values, {f"arm{arm}": f"family{belongs[arm]}" for arm in range(arms)}


def known(estimate: MixedEstimate | None) -> MixedEstimate:
    assert estimate is not None
    return estimate


LMER = """
suppressMessages({library(lme4); library(lmerTest)})
result <- do.call(rbind, lapply(split(study, study$case), function(d) {
  d <- droplevels(d)
  d$arm <- relevel(d$arm, "arm0"); d$seed <- factor(d$seed); d$y <- d$y / d$unit
  formula <- if (nlevels(d$family) > 1) y ~ arm + (1 | seed) + (1 | seed:family) else y ~ arm + (1 | seed)
  precise <- lmerControl(optimizer = "bobyqa", calc.derivs = FALSE, optCtrl = list(rhoend = 1e-10, maxfun = 1e5))
  m <- suppressWarnings(suppressMessages(lmer(formula, d, REML = TRUE, control = precise)))
  variances <- as.data.frame(VarCorr(m)); variance <- setNames(variances$vcov, variances$grp)
  t <- coef(summary(m))[-1, , drop = FALSE]
  data.frame(case = d$case[1], arm = sub("arm", "", rownames(t)), mean = t[, 1] * d$unit[1],
             error = t[, 2] * d$unit[1], degrees = t[, 3], seed = variance["seed"], residual = variance["Residual"])
}))
"""


@requires_r("lme4", "lmerTest")
def test_means_errors_and_degrees_of_freedom_are_those_of_lmertest() -> None:
    """Balanced, with missing runs, and at the boundary, where variances are estimated as zero."""
    studies = {case: simulated(**kind) for case, kind in CASES.items()}
    rows = [
        {"case": case, "arm": arm, "family": families[arm], "seed": seed, "y": y, "unit": CASES[case].get("unit", 1)}
        for case, (values, families) in studies.items()
        for arm, by_seed in values.items()
        for seed, y in by_seed.items()
    ]
    ours = {case: mixed_differences(values, "arm0", families) for case, (values, families) in studies.items()}
    judged, singular = 0, set()
    for row in run_r(LMER, study=rows):
        found = known(ours[row["case"]][row["arm"]])
        numbers = [found.mean, found.error, found.degrees]
        assert numbers == pytest.approx([float(row[key]) for key in ("mean", "error", "degrees")], rel=1e-5), row
        unit = CASES[row["case"]].get("unit", 1.0)
        variances = [v / unit**2 for v in (found.components.seed, found.components.residual)]
        assert variances == pytest.approx([float(row["seed"]), float(row["residual"])], rel=1e-3, abs=1e-5), row
        judged += 1
        singular |= {row["case"]} if 0.0 in (found.components.seed, found.components.family_seed) else set()
    assert judged == sum(len(values) - 1 for values, _ in studies.values())
    assert {"no reaction of families", "no luck of seeds", "no luck, one family", "nothing but residuals"} <= singular
    assert "balanced" not in singular


@pytest.mark.parametrize("case", ["balanced", "missing runs", "unequal families", "three families"])
def test_variances_are_those_of_statsmodels(case: str) -> None:
    values, families = simulated(**CASES[case] | {"number": 7})
    data = pandas.DataFrame(
        [(arm, families[arm], seed, y) for arm, by_seed in values.items() for seed, y in by_seed.items()],
        columns=["arm", "family", "seed", "y"],
    )
    parts = {"seed": "0 + C(seed)", "family": "0 + C(seed):C(family)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = MixedLM.from_formula("y ~ C(arm)", data, groups=np.ones(len(data)), vc_formula=parts)
        judge = model.fit(reml=True, method=["lbfgs", "bfgs"], gtol=1e-8)
    found = known(mixed_differences(values, "arm0", families)["arm1"])
    variances = dict(zip(model.exog_vc.names, judge.vcomp, strict=True))
    expected = (variances["seed"], variances["family"], judge.scale)
    ours = (found.components.seed, found.components.family_seed, found.components.residual)
    assert ours == pytest.approx(expected, rel=1e-2, abs=2e-3)
    assert found.mean == pytest.approx(judge.fe_params["C(arm)[T.arm1]"], rel=1e-3)


def test_of_two_arms_it_is_the_paired_t_test() -> None:
    """The seed's luck is positive here; at zero, runs would be two independent samples."""
    values, families = simulated(arms=2, families=1, luck=3.0, seeds=6)
    found = known(mixed_differences(values, "arm0", families)["arm1"])
    arm, baseline = (list(values[name].values()) for name in ("arm1", "arm0"))
    judge = stats.ttest_rel(arm, baseline)
    assert found.components.seed > 0
    assert found.mean / found.error == pytest.approx(judge.statistic)
    assert found.degrees == pytest.approx(judge.df)


def test_of_one_family_it_is_the_randomised_block_design() -> None:
    """Complete runs: residual variance of arm + seed with (arms - 1)(seeds - 1) degrees of freedom (Montgomery, 4.1).
    Declared families of one arm each say no more."""
    values, families = simulated(families=1, luck=2.0)
    table = np.array([list(by_seed.values()) for by_seed in values.values()])
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    variance = (residual**2).sum() / (5 * 4)
    for declared in (families, {arm: arm for arm in values}):
        found = known(mixed_differences(values, "arm0", declared)["arm3"])
        assert found.components.family_seed is None
        assert found.mean == pytest.approx(table[3].mean() - table[0].mean())
        assert found.error == pytest.approx(math.sqrt(2 * variance / 5))
        assert found.degrees == pytest.approx(20)


def test_arms_that_share_their_runs_count_once() -> None:
    values, families = simulated()
    alone = mixed_differences(values, "arm0", families)
    values |= {"twin": dict(values["arm2"]), "same": dict(values["arm0"])}
    found = mixed_differences(values, "arm0", families | {"twin": "family0", "same": "family0"})
    assert {arm: found[arm] for arm in alone} == alone
    assert found["twin"] == found["arm2"]
    assert (known(found["same"]).mean, known(found["same"]).error) == (0.0, 0.0)


def test_an_arm_without_a_seed_of_the_baseline_has_no_estimate_and_takes_none_from_others() -> None:
    values, families = simulated(arms=4, seeds=6)
    values["arm2"] = {seed + 100: y for seed, y in values["arm2"].items()}
    values["arm3"] = {}
    found = mixed_differences(values, "arm0", families)
    assert found["arm1"] is not None
    assert (found["arm2"], found["arm3"]) == (None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 2.5}},  # one seed
        {"b": {0: 2.0, 1: 2.1}, "c": {0: 2.5, 1: 2.4}},  # no baseline
        {"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 3.0}, "c": {0: 3.0, 1: 4.0}},  # no residual
        {"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}, "c": {0: 3.0, 1: 3.0}},  # no scatter at all
    ],
)
def test_without_replication_nothing_is_estimated(values: Values) -> None:
    assert mixed_differences(values, "a", dict.fromkeys("abc", "f")) == dict.fromkeys([n for n in values if n != "a"])


def test_the_note_says_what_was_estimated_and_assumed() -> None:
    note = VarianceComponents(4.0, 0.25, 0.01).note
    for part in ("seed 2", "family × seed 0.5", "residual 0.1", "assumes that all arms scatter alike"):
        assert part in note
    assert "family" not in VarianceComponents(4.0, None, 0.01).note


@pytest.mark.slow
def test_intervals_cover_where_the_model_holds_and_not_where_an_arm_is_wide() -> None:
    """8 arms of two families, 5 seeds; the last arm scatters three times as much in the second half of the studies."""
    random, families = np.random.default_rng(0), {f"arm{arm}": f"family{arm // 4}" for arm in range(8)}
    inside: dict[bool, list[bool]] = {False: [], True: []}
    for wide, _ in itertools.product(inside, range(150)):
        y = random.normal(0, 1, (8, 5))
        y[7] *= 3 if wide else 1
        y += random.normal(0, 1, 5) + np.repeat(random.normal(0, 1, (2, 5)), 4, axis=0)
        values = {f"arm{arm}": dict(enumerate(map(float, row))) for arm, row in enumerate(y)}
        found = known(mixed_differences(values, "arm0", families)["arm7"])
        inside[wide].append(abs(found.mean) <= stats.t.ppf(0.975, found.degrees) * found.error)
    assert np.mean(inside[False]) == pytest.approx(0.95, abs=within(0.95, 150))
    assert np.mean(inside[True]) < 0.89
