"""The mixed model: judged by R's lme4 and lmerTest, by statsmodels, by the textbook's block design, and by coverage."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pandas
import pytest
from r_judge import requires_r, run_r
from scipy import stats
from simulated import within
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from lit_llm.analysis.mixed_model import MixedEstimate, VarianceComponents, mixed_differences

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
    "no reaction of families": {"family": 0.0, "number": 1},
    "no luck of seeds": {"family": 1.0, "luck": 0.0},
    "no luck, one family": {"families": 1, "luck": 0.0, "number": 3, "missing": 0.1},
    "nothing but residuals": {"luck": 0.0, "number": 4, "missing": 0.1},
    "two seeds": {"family": 1.0, "seeds": 2},
    "two arms": {"families": 1, "arms": 2},
    "small values": {"family": 1.0, "unit": 1e-4, "missing": 0.1},
    "much luck": {"family": 1.0, "luck": 50.0, "missing": 0.1},
    "sixty arms": {"family": 0.5, "arms": 60, "seeds": 6, "missing": 0.1},
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
  precise <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-10, maxfun = 1e5))
  m <- suppressWarnings(suppressMessages(lmer(formula, d, REML = TRUE, control = precise)))
  variances <- as.data.frame(VarCorr(m)); variance <- setNames(variances$vcov, variances$grp)
  t <- coef(summary(m))[-1, , drop = FALSE]
  data.frame(case = d$case[1], arm = sub("arm", "", rownames(t)), mean = t[, 1] * d$unit[1], error = t[, 2] * d$unit[1],
             degrees = t[, 3], seed = variance["seed"], family = variance["seed:family"], residual = variance["Residual"])
}))
"""


@requires_r("lme4", "lmerTest")
def test_means_errors_and_degrees_of_freedom_are_those_of_lmertest() -> None:
    """Balanced, with missing runs, and at the boundary, where variances are estimated as zero."""
    studies = {case: simulated(**kind) for case, kind in CASES.items()}  # type: ignore[arg-type]
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
        assert numbers == pytest.approx([float(row[key]) for key in ("mean", "error", "degrees")], rel=1e-3), row
        unit = CASES[row["case"]].get("unit", 1.0)
        variances = [v / unit**2 for v in (found.components.seed, found.components.residual)]
        assert variances == pytest.approx([float(row["seed"]), float(row["residual"])], rel=1e-3, abs=1e-5), row
        judged += 1
        singular |= {row["case"]} if 0.0 in (found.components.seed, found.components.family_seed) else set()
    assert judged == sum(len(values) - 1 for values, _ in studies.values())
    assert {"no reaction of families", "no luck of seeds", "no luck, one family", "nothing but residuals"} <= singular
    assert "balanced" not in singular
