"""Effects of two-level designs: judged by planted effects, least squares, scipy's t-test, and by coverage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.comparison import Design, compare
from lit_llm.statistics.effects import Contrast, Effects, Layout, effects, judged_effects
from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.run_results import RunResult
from lit_llm.studies.fractional_factorial import aliases_in_letters, effect_of, find, lettered
from lit_llm.studies.load import load_study

SEEDS = (3, 5, 8)


def contrasts(factors: int, size: int = 2) -> tuple[Contrast, ...]:
    members = [chosen for n in range(1, size + 1) for chosen in itertools.combinations(range(factors), n)]
    return tuple(Contrast(lettered(effect_of(*m)), tuple(f"f{i}" for i in m), (), m) for m in members)


def full(factors: int) -> Layout:
    cells = itertools.product((0, 1), repeat=factors)
    return Layout("g", {"".join(map(str, cell)): cell for cell in cells}, contrasts(factors))


def part(factors: int, resolution: int) -> Layout:
    fraction = find(factors, resolution)
    assert fraction is not None
    found = tuple(
        Contrast(c.name, c.factors, (), c.members, aliases_in_letters(fraction, effect_of(*c.members)))
        for c in contrasts(factors)
    )
    return Layout("g", {"".join(map(str, cell)): cell for cell in fraction.combinations}, found)


def table_of(layout: Layout, value: Callable[[np.ndarray, int], float]) -> dict[str, dict[int, float]]:
    """value(levels coded -1 and +1, number of the seed) for every arm and seed."""
    return {
        arm: {seed: value(2 * np.array(levels) - 1, i) for i, seed in enumerate(SEEDS)}
        for arm, levels in layout.arms.items()
    }


def noisy(layout: Layout, random: np.random.Generator, scale: float = 0.1) -> dict[str, dict[int, float]]:
    luck = random.normal(size=len(SEEDS))
    return table_of(layout, lambda _, seed: 3.0 + luck[seed] + random.normal(0, scale))


def means(found: Effects) -> dict[str, float]:
    assert all(row.effect is not None for row in found.rows)
    return {row.name: row.effect.mean for row in found.rows if row.effect is not None}


def test_an_effect_is_the_second_level_minus_the_first_and_an_interaction_half_the_difference_of_differences() -> None:
    """By hand, on the four cells of two factors: first 10, A alone 14, B alone 11, both 21."""
    found = effects(full(2), {"00": {0: 10.0}, "10": {0: 14.0}, "01": {0: 11.0}, "11": {0: 21.0}}, {})
    assert means(found) == {"A": (4 + 10) / 2, "B": (1 + 7) / 2, "AB": ((21 - 11) - (14 - 10)) / 2}


def test_planted_effects_are_found_whatever_the_luck_of_the_seeds() -> None:
    """In y = x β, coded ±1, the mean of the second level lies 2β above that of the first."""
    luck = [0.0, 7.0, -3.0]
    values = table_of(full(4), lambda x, seed: luck[seed] + 0.5 * x[0] - 0.25 * x[3] + 0.1 * x[1] * x[2])
    found = means(effects(full(4), values, {}))
    expected = dict.fromkeys(found, 0.0) | {"A": 1.0, "D": -0.5, "BC": 0.2}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("layout", [full(3), part(5, 5), part(8, 5)], ids=["2^3", "2^(5-1)", "2^(8-2)"])
def test_estimates_are_those_of_least_squares(layout: Layout) -> None:
    """Judge: numpy's least squares with seeds as blocks; an effect is twice the coefficient."""
    values = noisy(layout, np.random.default_rng(0))
    rows = [(arm, i, seed) for arm in layout.arms for i, seed in enumerate(SEEDS)]
    signs = {arm: 2 * np.array(levels) - 1 for arm, levels in layout.arms.items()}
    design = np.array(
        [
            [float(i == j) for j in range(len(SEEDS))] + [signs[arm][list(c.members)].prod() for c in layout.contrasts]
            for arm, i, _ in rows
        ]
    )
    fitted, *_ = np.linalg.lstsq(design, np.array([values[arm][seed] for arm, _, seed in rows]), rcond=None)
    assert list(means(effects(layout, values, {})).values()) == pytest.approx(2 * fitted[len(SEEDS) :])


def test_in_a_fraction_an_effect_has_its_aliases_in_it_with_their_signs() -> None:
    """Every effect of a resolution III design planted alone shows where the alias strings say, only there."""
    layout = part(5, 3)
    told = {c.name: [f"+{c.name}", *c.aliases.split()] for c in layout.contrasts}
    for planted in layout.contrasts:
        values = table_of(layout, lambda x, _, planted=planted: 0.5 * x[list(planted.members)].prod())
        for name, mean in means(effects(layout, values, {})).items():
            signs = [word[0] for word in told[name] if word[1:] == planted.name]
            assert mean == pytest.approx({"+": 1.0, "−": -1.0}[signs[0]] if signs else 0.0)
    assert {word[0] for words in told.values() for word in words[1:]} == {"+", "−", "."}


def own_scatter(layout: Layout) -> dict[str, dict[int, float]]:
    """Values of which the first factor's effect varies with the seed far more than anything else."""
    random = np.random.default_rng(4)
    strength = [0.0, 5.0, 10.0]
    return table_of(layout, lambda x, seed: strength[seed] * x[0] + random.normal(0, 0.01))


def per_seed(layout: Layout, values: Mapping[str, Mapping[int, float]], contrast: Contrast) -> list[float]:
    signs = np.array([(2 * np.array(cell) - 1)[list(contrast.members)].prod() for cell in layout.arms.values()])
    return [float(signs @ [values[arm][seed] for arm in layout.arms] * 2 / len(signs)) for seed in SEEDS]


def test_an_interval_is_that_of_scipys_t_test_over_the_seeds() -> None:
    layout = full(3)
    values = own_scatter(layout)
    found = effects(layout, values, {}, Noise("paired"))
    for row, contrast in zip(found.rows, layout.contrasts, strict=True):
        interval = stats.ttest_1samp(per_seed(layout, values, contrast), 0).confidence_interval(0.95)
        assert row.effect is not None
        assert (row.effect.low, row.effect.high) == pytest.approx((interval.low, interval.high))
        assert (row.effect.pooled, row.effect.degrees, row.effect.seeds) == (False, 2, 3)


def test_an_effect_that_varies_with_the_seed_borrows_next_to_nothing_from_the_others() -> None:
    layout = full(3)
    alone, moderated = (effects(layout, own_scatter(layout), {}, Noise(how)) for how in ("paired", "moderated"))
    first = [found.rows[0].effect for found in (alone, moderated)]
    assert first[0].error == pytest.approx(first[1].error, rel=1e-4)
    for row, other in zip(alone.rows[1:], moderated.rows[1:], strict=True):
        assert other.effect.error > row.effect.error  # the wild one is among the others


@pytest.mark.parametrize(
    ("correction", "method"), [("none", None), ("holm", "holm"), ("fdr_bh", "fdr_bh"), ("dunnett", "holm")]
)
def test_p_is_that_of_scipys_t_test_corrected_as_statsmodels_does_over_all_groups(
    correction: Correction, method: str | None
) -> None:
    """Two groups of seven effects are one family; Dunnett's procedure is of arms, so Holm's stands in. The verdict goes
    by p, and intervals that are corrected are wider."""
    layout, random = full(3), np.random.default_rng(11)
    groups, alone = [], []
    for strength in (0.05, 0.2):
        values = table_of(layout, lambda x, seed: seed * x[0] + strength * x[1] + random.normal(0, 0.05))  # noqa: B023
        groups.append(effects(layout, values, {}, Noise("paired")))
        alone += [float(stats.ttest_1samp(per_seed(layout, values, c), 0).pvalue) for c in layout.contrasts]
    expected = alone if method is None else multipletests(alone, method=method)[1]
    found = judged_effects(groups, "val/target_nll", correction)
    rows = [row for group in found for row in group.rows]
    assert [row.p for row in rows] == pytest.approx(expected)
    assert len({p < 0.05 for p in alone}) == 2
    for row, p, plain in zip(rows, expected, [row for group in groups for row in group.rows], strict=True):
        assert row.effect is not None
        assert plain.effect is not None
        assert row.effect.mean == plain.effect.mean
        assert (row.effect.high > plain.effect.high) == (correction != "none")
        assert row.verdict == ("undecided" if p >= 0.05 else "better" if row.effect.mean < 0 else "worse")
    assert any(f"for {len(alone)} comparisons" in note for note in found[0].notes)


def test_a_margin_is_for_effects_too() -> None:
    layout = full(2)
    values = noisy(layout, np.random.default_rng(4), 0.01)
    (found,) = judged_effects([effects(layout, values, {})], "val/target_nll", margin=0.5)
    assert {row.verdict for row in found.rows} == {"no difference larger than 0.5"}
    (one,) = judged_effects([effects(layout, {arm: {0: 1.0} for arm in layout.arms}, {})], "val/target_nll", margin=0.5)
    assert {(row.p, row.verdict) for row in one.rows} == {(None, "not enough seeds")}


def test_a_pooled_interval_is_that_of_the_linear_model_of_arms_and_seeds() -> None:
    """Judge: least squares with a coefficient for every arm and seed; a contrast's variance by the usual formula."""
    layout = part(5, 5)
    values = noisy(layout, np.random.default_rng(1))
    found = effects(layout, values, {}, Noise("pooled"))
    arms, count = list(layout.arms), len(layout.arms)
    design, target = [], []
    for a, arm in enumerate(arms):
        for s, seed in enumerate(SEEDS):
            design.append([a == i for i in range(count)] + [s == j for j in range(1, len(SEEDS))])
            target.append(values[arm][seed])
    matrix = np.array(design, float)
    fitted, residual, rank, _ = np.linalg.lstsq(matrix, np.array(target), rcond=None)
    degrees = len(target) - rank
    for row, contrast in zip(found.rows, layout.contrasts, strict=True):
        signs = [(2 * np.array(cell) - 1)[list(contrast.members)].prod() for cell in layout.arms.values()]
        weights = np.array(signs + [0] * (len(SEEDS) - 1)) * 2 / count
        error = np.sqrt(residual[0] / degrees * weights @ np.linalg.inv(matrix.T @ matrix) @ weights)
        half = stats.t.ppf(0.975, degrees) * error
        assert row.effect is not None
        assert row.effect.mean == pytest.approx(weights @ fitted)
        assert (row.effect.low, row.effect.high) == pytest.approx((weights @ fitted - half, weights @ fitted + half))
        assert (row.effect.pooled, row.effect.degrees) == (True, degrees)


@pytest.mark.parametrize("wild", ["nothing", "an effect", "an arm"])
def test_the_intervals_cover_the_true_effects(wild: str) -> None:
    """At least 95% of the intervals hold the truth: where all scatter alike, where one effect varies by the seed, where
    one arm scatters more."""
    layout, random, hits = full(3), np.random.default_rng(2), []
    for _ in range(400):
        luck = random.normal(0, 1, len(SEEDS))
        own = random.normal(0, 2.0 if wild == "an effect" else 0.0, len(SEEDS))
        scale = {"111": 3.0} if wild == "an arm" else {}
        values = {
            arm: {
                seed: 0.3 * cell[0] + luck[i] + own[i] * (2 * cell[0] - 1) + random.normal(0, scale.get(arm, 0.2))
                for i, seed in enumerate(SEEDS)
            }
            for arm, cell in layout.arms.items()
        }
        found = effects(layout, values, {})
        row = found.rows[0].effect
        assert row is not None
        assert row.low is not None
        assert row.high is not None
        hits.append(row.low <= 0.3 <= row.high)
    assert np.mean(hits) >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


def test_a_seed_of_which_a_run_is_missing_gives_no_effect_and_the_run_is_named() -> None:
    layout = full(2)
    values = table_of(layout, lambda x, seed: float(x[0] + seed))
    whole = effects(layout, values, {})
    values["11"] = {seed: value for seed, value in values["11"].items() if seed != 5}
    values["00"][99] = 1e9
    found = effects(layout, values, {("11", 5): "diverged", ("elsewhere", 3): "failed"})
    assert (found.seeds, whole.seeds) == ((3, 8), (3, 5, 8))
    assert means(found) == means(whole) == {"A": 2.0, "B": 0.0, "AB": 0.0}
    assert [note for note in found.notes if "left out" in note] == ["seed 5 is left out, no value of 11 (diverged)"]


def test_without_a_complete_seed_there_is_no_effect() -> None:
    layout = full(2)
    values = {arm: {i: 1.0} for i, arm in enumerate(layout.arms)}
    found = effects(layout, values, {(arm, 0): "pending" for arm in list(layout.arms)[1:]})
    assert [row.effect for row in found.rows] == [None, None, None]
    assert "seed 0 is left out, no value of 01 (pending), 10 (pending), 11 (pending)" in found.notes
    assert any("no effects yet" in note for note in found.notes)


def test_one_complete_seed_has_effects_and_no_intervals() -> None:
    layout = full(2)
    found = effects(layout, {arm: {0: float(i)} for i, arm in enumerate(layout.arms)}, {})
    assert [(row.effect.mean, row.effect.low) for row in found.rows if row.effect] == [
        (2.0, None),
        (1.0, None),
        (0, None),
    ]
    assert any("no interval" in note for note in found.notes)


# --- of a study ----------------------------------------------------------------------------------------------------

A, B, C = "model.attention.output_norm", "model.attention.rope", "pretrain.training.z_loss"


@pytest.fixture
def of_study(tmp_path) -> Callable[..., tuple[Effects, ...]]:
    """of_study(text, value, lost): the effects of a study whose run of (arm, levels, seed) has value(levels)."""
    from lit_llm.studies.estimable_effects import layouts

    def report(text: str, value: Callable[[Mapping[str, str]], float], lost: Mapping[str, str] = {}):
        path = tmp_path / "s.yaml"
        path.write_text(f"study: s\nquestion: q\nextends: redllm-tiny\nseeds: [0, 1]\n{text}")
        ablation = load_study(path)
        runs = []
        for arm, seed in itertools.product(ablation.arms, ablation.study.seeds):
            name = f"{arm.name}/{seed}"
            result = {"metrics": {"val/target_nll": value(arm.levels) + seed}, "flops": 1.0, "parameters": 1}
            result["provenance"] = {"code": "other" if lost.get(name) == "code" else "x"}
            result["finished"] = 0 if lost.get(name) == "code" else 1
            state = lost.get(name, "done")
            runs.append(RunResult(arm.name, arm.baseline, seed, "done" if state == "code" else state, result))
        return compare(runs, "val/target_nll", Design(layouts(ablation))).effects

    return report


GRID = f"grid: {{design: factorial, factors: {{{A}: [head, none], {B}: [continuous, none]}}}}\n"


def test_a_factorial_of_two_level_factors_shows_main_effects_and_all_two_factor_interactions(of_study) -> None:
    def value(levels: Mapping[str, str]) -> float:
        a, b = levels[A] == "none", levels[B] == "none"
        return 4.0 * a + 1.0 * b + 2.0 * (a and b)

    (found,) = of_study(GRID, value)
    assert means(found) == pytest.approx({"A": 5.0, "B": 2.0, "AB": 1.0})
    assert found.rows[0].factors == (A,)
    assert found.rows[0].levels == ("head", "none")
    assert found.rows[2].factors == (A, B)
    assert (found.group, found.arms, found.seeds) == ("baseline", 4, (0, 1))
    three = GRID.replace("}}", f", {C}: {{on: {{{C}: 1e-4}}, off: {{{C}: 0.0}}}}}}}}")  # a bundle is a factor like any
    (found,) = of_study(three, lambda levels: 3.0 * (levels[C] == "off"))
    assert means(found) == pytest.approx({"A": 0, "B": 0, "C": 3.0, "AB": 0, "AC": 0, "BC": 0})


def test_a_fraction_shows_main_effects_and_the_interactions_that_were_asked_for(of_study) -> None:
    d, e = "pretrain.training.optimizer.lr", "pretrain.training.clip_norm"
    factors = f"{{{A}: [head, none], {B}: [continuous, none], {C}: [1e-4, 0.0], {d}: [1e-3, 1e-2], {e}: [1.0, null]}}"
    grid = f"grid: {{design: fractional_factorial, resolution: 5, interactions: [[{e}, {B}]], factors: {factors}}}\n"

    def value(levels: Mapping[str, str]) -> float:
        return 2.0 * (levels[e] == "null" and levels[B] == "none") + 0.5 * (levels[d] == "0.01")

    (found,) = of_study(grid, value)
    assert means(found) == pytest.approx({"A": 0, "B": 1.0, "C": 0, "D": 0.5, "E": 1.0, "BE": 1.0})
    assert found.arms == 16
    assert {row.aliases for row in found.rows} == {"..."}


def test_named_arms_have_effects_each_of_its_own_and_one_outside_the_grid_has_none(of_study) -> None:
    arms = "arms: {red: {}, wide: {model: {d_model: 32}}, alone: {grid: false, model: {d_model: 128}}}\n"
    red, wide = of_study(arms + GRID, lambda levels: 1.0 * (levels.get(A) == "none"), {"red/1": "diverged"})
    assert (red.group, red.seeds, wide.group, wide.seeds) == ("red", (0,), "wide", (0, 1))
    assert means(red) == means(wide) == pytest.approx({"A": 1.0, "B": 0, "AB": 0})
    assert red.notes[0] == "seed 1 is left out, no value of red (diverged)"


def test_within_a_factor_the_effects_of_the_others_are_estimated_anew_at_each_level(of_study) -> None:
    grid = f"{GRID.rstrip()[:-2]}, {C}: [1e-4, 0.0]}}}}\ncompare: {{stratify_by: [{C}]}}\n"
    low, high = of_study(grid, lambda levels: (1.0 if levels[C] == "0.0001" else 5.0) * (levels[A] == "none"))
    assert (low.group, high.group) == ("baseline/z_loss=0.0001", "baseline/z_loss=0")
    assert means(low) == pytest.approx({"A": 1.0, "B": 0, "AB": 0})
    assert means(high) == pytest.approx({"A": 5.0, "B": 0, "AB": 0})


def test_results_of_other_code_are_in_no_effect(of_study) -> None:
    (found,) = of_study(GRID, lambda _: 1.0, {"baseline/rope=none/0": "code"})
    assert found.seeds == (1,)
    assert "seed 0 is left out, no value of baseline/rope=none (of other code or another device)" in found.notes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "arms: {a: {}, b: {model: {d_model: 32}}}\n",
        GRID.replace("factorial", "one_at_a_time"),
        GRID.replace("factorial", "paired"),
        GRID.replace("[head, none]", "[head, none, concat]"),
        GRID.replace("}}\n", f"}}, exclude: [{{{A}: none, {B}: none}}]}}\n"),
        f"grid: {{design: factorial, factors: {{{A}: [head, none]}}}}\n",
    ],
)
def test_other_designs_show_no_effects(of_study, text: str) -> None:
    assert of_study(text, lambda _: 1.0) == ()
