"""Scaling laws: judged by planted laws, numpy, scipy, statsmodels, and Chinchilla's formula of the best size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import least_squares
from scipy.stats import t as student
from statsmodels.stats.anova import anova_lm

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.report.answer import answer
from lit_llm.report.tables.scaling import scaling_tables
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.scaling.comparison import Multiplier, Scaling, scaling
from lit_llm.statistics.scaling.isoflop import isoflop_minima
from lit_llm.statistics.scaling.joint_law import JointLaw
from lit_llm.statistics.scaling.laws import PowerLaw, fit_power_law
from lit_llm.statistics.scaling.runs import ScalingRun
from lit_llm.studies.load import load_study
from lit_llm.studies.scaling import scaling_of
from lit_llm.studies.schema import Compare

FLOPS = np.geomspace(1e17, 1e21, 9)


def runs_of(
    law: PowerLaw,
    noise: float,
    random: np.random.Generator,
    group: str = "a",
    seeds: int = 4,
    lack_of_fit: float = 0.0,
    flops: np.ndarray = FLOPS,
) -> list[ScalingRun]:
    """Sizes that deviate from the law, and seeds that deviate from their size, both relative to the loss."""
    return [
        ScalingRun(
            group, x, 1.0, 1.0, law.at(x) * float(np.exp(off + random.normal(0, noise))), f"{group}/{x:.3g}", seed
        )
        for x in map(float, flops)
        for off in [random.normal(0, lack_of_fit)]
        for seed in range(seeds)
    ]


def means(runs: list[ScalingRun]) -> np.ndarray:
    """Mean log loss of each x."""
    return np.array([np.mean([np.log(r.loss) for r in runs if r.train_flops == x]) for x in _xs(runs)])


def _xs(runs: list[ScalingRun]) -> list[float]:
    return list(dict.fromkeys(run.train_flops for run in runs))


# --- fits -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("seed", range(5))
def test_with_e_it_is_the_fit_of_least_squares_on_the_logarithm(seed: int) -> None:
    """Judge: scipy's least_squares, begun at the truth."""
    law, random = PowerLaw(1.69, 3.5 * 1e17**0.25, 0.25), np.random.default_rng(seed)
    loss = [law.at(x) * float(np.exp(random.normal(0, 0.02))) for x in FLOPS]
    u = np.log(FLOPS) - np.log(FLOPS).mean()

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(np.exp(p[0]) + np.exp(p[1] - p[2] * u)) - np.log(loss)

    judge = least_squares(residuals, [np.log(1.69), np.log(law.at(1e19) - 1.69), 0.25], xtol=1e-14, ftol=1e-14)
    found = fit_power_law(FLOPS, loss)
    assert (np.log(found.irreducible), found.exponent) == pytest.approx(judge.x[[0, 2]], rel=1e-3)


# --- sizes as the unit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_interval_of_the_exponent_is_students_on_the_size_means(seeds: int) -> None:
    """Judge: statsmodels' regression of the size means; 4,000 draws come within a twentieth of its width."""
    runs = runs_of(PowerLaw(0.0, 50.0, 0.1), 0.01, np.random.default_rng(8), seeds=seeds, lack_of_fit=0.02)
    (curve,) = scaling(runs, "m", "a", irreducible=False, draws=4000).curves
    line = sm.OLS(means(runs), sm.add_constant(-np.log(FLOPS))).fit()
    low, high = line.conf_int()[1]
    assert curve.exponent.value == pytest.approx(line.params[1])
    ends = [curve.exponent.low, curve.exponent.high]
    assert ends == pytest.approx([low, high], abs=0.05 * (high - low) / 2)


def test_the_band_is_that_of_the_straight_line_through_the_size_means() -> None:
    """Judge: statsmodels' confidence band of that line."""
    runs = runs_of(PowerLaw(0.0, 50.0, 0.1), 0.02, np.random.default_rng(8), seeds=1)
    (curve,) = scaling(runs, "m", "a", irreducible=False, draws=4000).curves
    x, low, high = np.array(curve.band).T
    assert (x[0], x[-1]) == pytest.approx((1e17, 1e21))
    line = sm.OLS(means(runs), sm.add_constant(np.log(FLOPS))).fit()
    judge = line.get_prediction(sm.add_constant(np.log(x))).conf_int(alpha=0.05)
    half = (judge[:, 1] - judge[:, 0]) / 2
    assert np.abs(np.log(low) - judge[:, 0]) / half == pytest.approx(np.zeros(len(x)), abs=0.1)
    assert np.abs(np.log(high) - judge[:, 1]) / half == pytest.approx(np.zeros(len(x)), abs=0.1)


def test_seeds_that_move_all_sizes_alike_widen_the_band_and_cancel_between_groups_that_share_them() -> None:
    """With four seeds the mean of the group is uncertain by their luck / 2: Student's interval, with 3 degrees of
    freedom and the half that moderates their variance towards that of the runs, which is nearly nothing here."""
    law, random = PowerLaw(0.0, 50.0, 0.1), np.random.default_rng(4)
    luck = [-0.06, -0.02, 0.02, 0.06]
    runs = []
    for group in "ab":
        for run in runs_of(law, 0.001, random, group, seeds=4):
            seed = run.seed or 0
            runs.append(ScalingRun(group, run.train_flops, 1, 1, run.loss * np.exp(luck[seed]), run.arm, seed))
    found = scaling(runs, "m", "a", irreducible=False, draws=4000)
    half = student.ppf(0.975, 3.5) * (3 / 3.5) ** 0.5 * np.std(luck, ddof=1) / 2
    _, low, high = found.curves[0].band[10]
    assert np.log(high / low) / 2 == pytest.approx(half, rel=0.1)
    times = found.multipliers[0].mean
    assert times.low is not None
    assert times.high is not None
    assert np.log(times.high / times.low) / 2 < 0.05  # an unpaired one would be 2 half / 0.1 = 1.6


def test_as_many_sizes_as_numbers_have_no_interval_and_say_so() -> None:
    law = PowerLaw(1.0, 50.0, 0.1)
    found = scaling(runs_of(law, 0.01, np.random.default_rng(1), seeds=5, flops=FLOPS[::4]), "m", "a")
    assert (found.curves[0].exponent.low, found.curves[0].band) == (None, ())
    assert "no interval with 3 sizes for 3 fitted numbers: a" in found.notes


def test_too_few_sizes_have_no_curve_and_say_so() -> None:
    runs = [ScalingRun("a", flops, 1, 1, 3.0) for flops in (1e18, 2e18)]
    found = scaling(runs, "m", "a")
    assert found.curves == ()
    assert found.notes == ("a: no curve yet: a power law with E needs 3 different x or more",)


def test_arms_at_equal_x_are_sizes_of_their_own() -> None:
    """Two models at each budget: 8 sizes, of which a law without E leaves 6 degrees of freedom."""
    law, random = PowerLaw(0.0, 50.0, 0.1), np.random.default_rng(2)
    runs = [
        ScalingRun("a", x, 1, 1, law.at(x) * (1 + 0.01 * model + 0.001 * random.normal()), f"{model}/{x}", seed)
        for x in (1e17, 1e18, 1e19, 1e20)
        for model in (-1, 1)
        for seed in (0, 1)
    ]
    (curve,) = scaling(runs, "m", "a", irreducible=False).curves
    assert curve.sizes == 8
    assert curve.lack_of_fit is not None
    assert curve.lack_of_fit.degrees == (6, 8)


# --- lack of fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [lambda run: True, lambda run: run.seed < 1 + run.train_flops // 1e18 % 3])
def test_lack_of_fit_is_the_f_test_against_free_means(keep: object) -> None:
    """Judge: statsmodels' comparison of the line with one mean a size, seeds equal or not."""
    assert callable(keep)
    runs = [
        run
        for run in runs_of(PowerLaw(0.0, 50.0, 0.1), 0.01, np.random.default_rng(5), seeds=3, lack_of_fit=0.01)
        if keep(run)
    ]
    x, y = np.log([r.train_flops for r in runs]), np.log([r.loss for r in runs])
    free = np.array([[value == each for each in np.unique(x)] for value in x], float)
    judge = anova_lm(sm.OLS(y, sm.add_constant(x)).fit(), sm.OLS(y, free).fit())
    test = scaling(runs, "m", "a", irreducible=False).curves[0].lack_of_fit
    assert test is not None
    assert (test.f, test.p) == pytest.approx((judge["F"][1], judge["Pr(>F)"][1]))
    assert test.degrees == (7, len(runs) - 9)


def test_a_law_that_does_not_hold_is_said_in_the_notes() -> None:
    law, random = PowerLaw(0.0, 50.0, 0.1), np.random.default_rng(6)
    off = scaling(runs_of(law, 0.001, random, seeds=3, lack_of_fit=0.035), "m", "a", irreducible=False)
    test = off.curves[0].lack_of_fit
    assert test is not None
    assert test.deviation == pytest.approx(0.035, rel=0.5)  # of nine sizes
    said = f"a: its sizes lie off the law by {test.deviation:.2%}, more than their seeds explain"
    assert any(note.startswith(said) and "more seeds do not" in note for note in off.notes)
    on = scaling(runs_of(law, 0.01, random, seeds=3), "m", "a", irreducible=False)
    assert not any("lie off" in note for note in on.notes)
    single = scaling(runs_of(law, 0.01, random, seeds=1), "m", "a", irreducible=False)
    assert "lack of fit is not tested without several seeds and a spare size: a" in single.notes


# --- two groups -----------------------------------------------------------------------------------------------------


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
    assert (found.mean.value, found.at_best.value, found.at_worst.value) == pytest.approx((3, 3, 3), rel=1e-3)
    assert (found.best, found.worst) == pytest.approx((law.at(1e21), thrice.at(1e18)), rel=1e-4)
    assert found.crossing is None
    apart = [ScalingRun("b", run.train_flops, 1, 1, 0.1 * run.loss) for run in a]
    nothing = scaling([*a, *apart], "m", "a", irreducible=False)
    assert nothing.multipliers == ()
    assert "b and a reach no loss in common, so their train_flops are not compared" in nothing.notes


def crossing_groups(noise: float, tilt: float = 0.01) -> tuple[Scaling, Multiplier]:
    """b begins above a and ends below it; they cross at 1e19."""
    a, b = PowerLaw(0.0, 100.0, 0.1), PowerLaw(0.0, 100.0 * 1e19**tilt, 0.1 + tilt)
    random = np.random.default_rng(7)
    found = scaling([*runs_of(a, noise, random), *runs_of(b, noise, random, "b")], "m", "a", irreducible=False)
    (times,) = found.multipliers
    return found, times


def test_curves_that_cross_are_reported_with_the_place_and_both_sides() -> None:
    found, times = crossing_groups(0.005)
    crossing = times.crossing
    assert crossing is not None
    assert crossing.x.value == pytest.approx(1e19, rel=0.5)
    assert crossing.x.low is not None
    assert crossing.x.high is not None
    assert 1e17 < crossing.x.low < 1e19 < crossing.x.high < 1e21
    assert crossing.loss.value == pytest.approx(PowerLaw(0.0, 100.0, 0.1).at(1e19), rel=0.03)
    assert (crossing.below_at_low_x, crossing.below_at_high_x, crossing.shown) == ("a", "b", True)
    assert times.at_worst.low is not None
    assert times.at_worst.low > 1
    assert times.at_best.high is not None
    assert times.at_best.high < 1
    assert any(
        "cross within the data" in note and "one multiplier does not describe them" in note for note in found.notes
    )
    names = [part.name for part in scaling_tables(found)]
    assert names == ["scaling", "multipliers", "crossings"]
    sentence = sentences(found)[1]
    assert sentence.startswith("The curves of b and a in m cross at ")
    assert f"times the training FLOPs at {times.worst:.3f}, and" in sentence
    assert f"times at {times.best:.3f}." in sentence


def sentences(found: Scaling) -> list[str]:
    from lit_llm.statistics.comparison import Row

    row = Row("a", "a", {"done": 1}, 1, 1.0, None, None, 1, 1.0, 1.0, 0.0)
    shown = answer(Comparison("m", (row,), (), scaling=found))
    return ["", *shown]


def test_a_crossing_that_noise_may_have_made_is_not_said_to_be_shown() -> None:
    """Equal laws cross somewhere by chance: of 40 such pairs at most a tenth are called crossing."""
    law, shown, crossed = PowerLaw(0.0, 100.0, 0.1), 0, 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        runs = [*runs_of(law, 0.01, random), *runs_of(law, 0.01, random, "b")]
        (times,) = scaling(runs, "m", "a", irreducible=False, draws=400).multipliers
        crossed += times.crossing is not None
        shown += times.crossing is not None and times.crossing.shown
    assert crossed > 10
    assert shown <= 4


# --- parameters and tokens ------------------------------------------------------------------------------------------

HOFFMANN = (1.69, 406.4, 0.34, 410.7, 0.28)
"""E, A, a, B, b of arXiv 2203.15556, equation 10."""


def chinchilla_runs(noise: float, random: np.random.Generator, sizes: int = 5) -> list[ScalingRun]:
    e, a_, a, b_, b = HOFFMANN
    return [
        ScalingRun(
            "a", 6 * n * d, n, d, (e + a_ / n**a + b_ / d**b) * float(np.exp(random.normal(0, noise))), f"{n}/{d}", s
        )
        for n in map(float, np.geomspace(7e7, 1.6e10, sizes))
        for d in map(float, np.geomspace(5e9, 5e11, sizes))
        for s in (0, 1)
    ]


def numbers(law: JointLaw) -> list[float]:
    fields = (law.irreducible, law.parameters_coefficient, law.parameters_exponent)
    return [each.value for each in (*fields, law.tokens_coefficient, law.tokens_exponent)]


def test_the_law_of_parameters_and_tokens_is_recovered() -> None:
    (law,) = scaling(chinchilla_runs(0.0, np.random.default_rng(0)), "m", "a", draws=100).joint
    assert numbers(law) == pytest.approx(HOFFMANN, rel=1e-3)
    assert law.best_size_exponent.value == pytest.approx(0.28 / 0.62, rel=1e-3)
    assert law.at(1e9, 2e10) == pytest.approx(1.69 + 406.4 / 1e9**0.34 + 410.7 / 2e10**0.28, rel=1e-4)


def test_the_law_of_parameters_and_tokens_is_scipys_fit_of_the_size_means() -> None:
    runs = chinchilla_runs(0.003, np.random.default_rng(1))
    (law,) = scaling(runs, "m", "a", draws=400).joint
    log_n, log_d, y = (np.log([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "loss"))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.logaddexp(p[0], np.logaddexp(p[1] - p[2] * log_n, p[3] - p[4] * log_d)) - y

    start = [np.log(1.69), np.log(406.4), 0.34, np.log(410.7), 0.28]
    judge = least_squares(residuals, start, x_scale="jac", xtol=1e-14, ftol=1e-14)
    fitted = [np.log(v) if at in (0, 1, 3) else v for at, v in enumerate(numbers(law))]
    assert fitted == pytest.approx(judge.x, rel=2e-3)
    for found, truth in ((law.irreducible, 1.69), (law.parameters_exponent, 0.34), (law.tokens_exponent, 0.28)):
        assert found.low is not None
        assert found.high is not None
        assert found.low < truth < found.high
        assert found.high - found.low < 0.4 * truth


def test_designs_that_do_not_identify_the_joint_law_are_refused_with_the_reason() -> None:
    random, whole = np.random.default_rng(0), chinchilla_runs(0.0, np.random.default_rng(0))
    ladder = [
        ScalingRun("a", 6 * n * 20 * n, n, 20 * n, run.loss, f"{n}", 0)
        for run, n in zip(whole, np.geomspace(1e7, 1e10, 10), strict=False)
    ]
    for runs, why in (
        (ladder, "parameters and tokens vary together (correlation 1.00 of their logarithms)"),
        ([run for run in whole if run.parameters < 1e8], "parameters vary 1 times, and it needs 2"),
        ([run for run in whole if run.tokens in (5e9, 5e11)], "tokens have 2 values, and it needs 3"),
        (runs_of(PowerLaw(0, 50, 0.1), 0.01, random, flops=FLOPS[:4]), "it has 5 numbers, and there are 4 sizes"),
    ):
        found = scaling(runs, "m", "a", irreducible=False, draws=50)
        assert found.joint == ()
        assert f"no law E + A/N^a + B/D^b of a: {why}" in found.notes


# --- isoFLOP --------------------------------------------------------------------------------------------------------


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


# --- studies --------------------------------------------------------------------------------------------------------


def test_a_study_asks_for_the_curves_of_its_arms_or_families() -> None:
    """Groups come from the study file, x and loss from the results; the tables show them."""
    folder = Path(__file__).parents[2] / "ablations"
    ablation = load_study(folder / "scaling.yaml")
    law = PowerLaw(0.0, 100.0, 0.1)
    results = []
    for number, arm in enumerate(ablation.arms):
        flops = 1e12 * 1.2 ** (number % 9)
        factor = 2.0 if arm.group.startswith("red") else 1.0
        metrics = {ablation.study.compare.metric: law.at(flops / factor)}
        whole = {"metrics": metrics, "parameters": 1, "tokens": 1, "flops": flops, "provenance": {}}
        results += [RunResult(arm.name, arm.baseline, seed, "done", whole) for seed in (0, 1)]
    asked = ablation.study.compare.scaling
    assert asked is not None
    found = scaling_of(ablation, results, asked)
    assert [curve.group for curve in found.curves] == ["decoder", "encoder_decoder"]
    assert [m.mean.value for m in found.multipliers] == [pytest.approx(2)]
    curves, times = scaling_tables(found)
    assert curves.title == "test/target_nll against training FLOPs: A x^-a"
    assert [row[:3] for row in curves.rows] == [["decoder", "9", "18"], ["encoder_decoder", "9", "18"]]
    assert times.rows[0][2].startswith("2 [")
    by_arm = scaling_of(ablation, results, asked.model_copy(update={"by": "arm"}))
    assert [curve.group for curve in by_arm.curves] == list(dict.fromkeys(arm.group for arm in ablation.arms))


@pytest.mark.parametrize("section", ["scaling", "gate"])
def test_scores_have_no_power_law(section: str) -> None:
    with pytest.raises(InputError, match="is no loss"):
        validate(Compare, tree({"metric": "throughput/tokens_per_second", section: {}}))
