"""Scaling fits: judged by planted power laws with 1% of noise, and by Chinchilla's formula of the best size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from simulated import within

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.config import Compare
from lit_llm.ablation.runs import _scaling
from lit_llm.analysis.comparison import RunResult
from lit_llm.analysis.estimates import Estimate
from lit_llm.analysis.isoflop import isoflop_minima
from lit_llm.analysis.scaling import scaling
from lit_llm.analysis.scaling_laws import PowerLaw, fit_power_law
from lit_llm.analysis.scaling_runs import ScalingRun
from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.report.scaling import scaling_parts

FLOPS = np.geomspace(1e17, 1e21, 9)
CHINCHILLA = PowerLaw(1.69, 406.4 * 5, 0.17)


def runs_of(
    law: PowerLaw, noise: float, random: np.random.Generator, group: str = "a", seeds: int = 4
) -> list[ScalingRun]:
    return [
        ScalingRun(group, flops, flops**0.5, flops**0.5, law.at(flops) * float(np.exp(random.normal(0, noise))))
        for flops in map(float, FLOPS)
        for _ in range(seeds)
    ]


@pytest.mark.parametrize("irreducible", [True, False])
def test_a_power_law_without_noise_is_found_to_six_digits(irreducible: bool) -> None:
    law = PowerLaw(1.69 if irreducible else 0.0, 2000.0, 0.17)
    found = fit_power_law(FLOPS, [law.at(x) for x in FLOPS], irreducible)
    assert (found.irreducible, found.exponent) == pytest.approx((law.irreducible, law.exponent), rel=1e-6, abs=1e-9)
    assert found.coefficient == pytest.approx(law.coefficient, rel=1e-5)


def test_without_e_it_is_the_straight_line_on_logarithmic_axes() -> None:
    """Judge: numpy's least squares."""
    random = np.random.default_rng(0)
    loss = 2000 * FLOPS**-0.1 * np.exp(random.normal(0, 0.1, 9))
    slope, level = np.polyfit(np.log(FLOPS), np.log(loss), 1)
    found = fit_power_law(FLOPS, loss, irreducible=False)
    assert (found.exponent, np.log(found.coefficient)) == pytest.approx((-slope, level))


def test_without_e_the_band_is_that_of_the_straight_line_on_logarithmic_axes() -> None:
    """Judge: statsmodels' confidence band of the regression line; a bootstrap comes within a tenth of its width."""
    runs = runs_of(PowerLaw(0.0, 50.0, 0.1), 0.02, np.random.default_rng(8), seeds=2)
    (curve,) = scaling(runs, "m", "a", irreducible=False, draws=4000).curves
    x, low, high = np.array(curve.band).T
    assert (x[0], x[-1]) == pytest.approx((1e17, 1e21))
    line = sm.OLS(np.log([r.loss for r in runs]), sm.add_constant(np.log([r.train_flops for r in runs]))).fit()
    judge = line.get_prediction(sm.add_constant(np.log(x))).conf_int(alpha=0.05)
    half = (judge[:, 1] - judge[:, 0]) / 2
    assert np.abs(np.log(low) - judge[:, 0]) / half == pytest.approx(np.zeros(len(x)), abs=0.1)
    assert np.abs(np.log(high) - judge[:, 1]) / half == pytest.approx(np.zeros(len(x)), abs=0.1)
    assert scaling([runs[0], runs[-1]], "m", "a", irreducible=False).curves[0].band == ()


@pytest.mark.parametrize("exponent", [0.05, 0.15])
def test_an_exponent_is_found_within_a_hundredth_under_one_percent_of_noise(exponent: float) -> None:
    law = PowerLaw(0.0, 50.0, exponent)
    (curve,) = scaling(runs_of(law, 0.01, np.random.default_rng(1)), "m", "a", irreducible=False).curves
    assert curve.exponent.value == pytest.approx(exponent, abs=0.01)
    assert curve.scatter == pytest.approx(0.01, rel=0.3)


def test_an_exponent_with_e_is_found_within_a_hundredth_where_the_curve_bends() -> None:
    """Losses from 5.2 down to 1.9: E is in sight."""
    law = PowerLaw(1.69, 3.5 * 1e17**0.25, 0.25)
    (curve,) = scaling(runs_of(law, 0.01, np.random.default_rng(2)), "m", "a").curves
    assert curve.exponent.value == pytest.approx(0.25, abs=0.01)
    assert curve.irreducible.value == pytest.approx(1.69, abs=0.05)


def holds(found: Estimate, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


@pytest.mark.parametrize(("irreducible", "count"), [(False, 150), (True, 30)])
def test_the_intervals_cover_exponent_e_and_multiplier(irreducible: bool, count: int) -> None:
    """Two groups with the same exponent, one of which needs twice the compute."""
    random, e = np.random.default_rng(3), 1.69 if irreducible else 0.0
    law = PowerLaw(e, 3.5 * 1e17**0.25, 0.25)
    twice = PowerLaw(e, law.coefficient * 2**law.exponent, law.exponent)
    hits = []
    for _ in range(count):
        runs = [run for group, its in (("a", law), ("b", twice)) for run in runs_of(its, 0.01, random, group, seeds=2)]
        found = scaling(runs, "m", "a", irreducible=irreducible, draws=199)
        curve, multiplier = found.curves[0], found.multipliers[0]
        hits.append([holds(curve.exponent, 0.25), holds(multiplier.mean, 2.0)])
        hits[-1] += [holds(curve.irreducible, 1.69)] if irreducible else []
    for share in np.mean(hits, axis=0):
        assert share == pytest.approx(0.95, abs=within(0.95, count))


def test_the_multiplier_is_of_the_losses_that_both_reach() -> None:
    """b's runs spend from 10 times a's least to 10 times its most, and need thrice: L(x) of b is that of a at x/3."""
    law, random = PowerLaw(0.0, 100.0, 0.1), np.random.default_rng(4)
    thrice = PowerLaw(0.0, 100.0 * 3**0.1, 0.1)
    a = runs_of(law, 1e-6, random)
    b = [
        ScalingRun("b", 10 * run.train_flops, 1, 1, thrice.at(10 * run.train_flops))
        for run in a
    ]  # fmt: skip
    (found,) = scaling([*a, *b], "m", "a", irreducible=False).multipliers
    assert (found.mean.value, found.at_best.value) == pytest.approx((3, 3), rel=1e-3)
    assert (found.best, found.worst) == pytest.approx((law.at(1e21), thrice.at(1e18)), rel=1e-4)
    apart = [ScalingRun("b", run.train_flops, 1, 1, 0.1 * run.loss) for run in a]
    nothing = scaling([*a, *apart], "m", "a", irreducible=False)
    assert nothing.multipliers == ()
    assert "b and a reach no loss in common, so their train_flops are not compared" in nothing.notes


def test_isoflop_minima_grow_as_chinchillas_formula_says() -> None:
    """Of L = E + A/N^0.34 + B/D^0.28 with 6ND = C the best N grows as C^(0.28/0.62) (arXiv 2203.15556, eq. 4)."""
    runs = []
    for flops in (1e18, 1e19, 1e20):
        best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (flops / 6) ** (0.28 / 0.62)
        for size in best * np.geomspace(0.7, 1.4, 5):
            tokens = flops / 6 / size
            runs.append(ScalingRun("a", flops, size, tokens, 1.69 + 406.4 / size**0.34 + 410.7 / tokens**0.28))
        found = [*isoflop_minima(runs)][-1]
        assert found.parameters == pytest.approx(best, rel=0.02)
        assert found.loss == pytest.approx(1.69 + 406.4 / best**0.34 + 410.7 / (flops / 6 / best) ** 0.28, rel=1e-3)
        assert found.points == tuple((run.parameters, run.loss) for run in runs[-5:])
        sizes, losses = np.array(found.parabola).T
        measured = np.array(found.points)
        fitted = np.polynomial.Polynomial.fit(np.log(measured[:, 0]), measured[:, 1], 2)
        assert losses == pytest.approx(fitted(np.log(sizes)))
        assert (sizes[0], sizes[-1]) == pytest.approx((0.7 * best, 1.4 * best))
    assert [round(found.train_flops / 1e18) for found in isoflop_minima(runs)] == [1, 10, 100]


def test_a_parabola_without_a_lowest_point_among_its_sizes_names_none() -> None:
    falling = [ScalingRun("a", 1e18, size, 1, 10 / size) for size in (1.0, 2.0, 3.0, 4.0)]
    assert [found.parameters for found in isoflop_minima(falling)] == [None]
    assert [*isoflop_minima(falling[:2])] == []


def test_too_few_sizes_have_no_curve_and_say_so() -> None:
    runs = [ScalingRun("a", flops, 1, 1, 3.0) for flops in (1e18, 2e18)]
    found = scaling(runs, "m", "a")
    assert found.curves == ()
    assert found.notes == ("a: no curve yet: a power law with E needs 3 different x or more",)


def test_a_study_asks_for_the_curves_of_its_arms_or_families() -> None:
    """Groups come from the study file, x and loss from the results; the tables show them."""
    folder = Path(__file__).parents[2] / "ablations"
    ablation = load_study(folder / "scaling.yaml")
    law = PowerLaw(0.0, 100.0, 0.1)
    results = []
    for number, arm in enumerate(ablation.arms):
        flops = 1e12 * (number % 9 + 1)
        factor = 2.0 if arm.group.startswith("red") else 1.0
        metrics = {"val/target_nll": law.at(flops / factor)}
        whole = {"metrics": metrics, "parameters": 1, "tokens": 1, "flops": flops, "provenance": {}}
        results += [RunResult(arm.name, arm.baseline, seed, "done", whole) for seed in (0, 1)]
    asked = ablation.study.compare.scaling
    assert asked is not None
    found = _scaling(ablation, results, asked)
    assert [curve.group for curve in found.curves] == ["decoder", "encoder_decoder"]
    assert [m.mean.value for m in found.multipliers] == [pytest.approx(2)]
    curves, times = scaling_parts(found)
    assert curves.title == "val/target_nll against training FLOPs: A x^-a"
    assert [row[:2] for row in curves.rows] == [["decoder", "18"], ["encoder_decoder", "18"]]
    assert times.rows[0][2].startswith("2 [")
    by_arm = _scaling(ablation, results, asked.model_copy(update={"by": "arm"}))
    assert [curve.group for curve in by_arm.curves] == list(dict.fromkeys(arm.group for arm in ablation.arms))


def test_scores_have_no_power_law() -> None:
    with pytest.raises(InputError, match="is no loss"):
        validate(Compare, tree({"metric": "throughput/tokens_per_second", "scaling": {}}))
