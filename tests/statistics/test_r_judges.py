"""R as a judge of paired t tests, corrections and repeated measures."""

from __future__ import annotations

import itertools

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM

from lit_llm.statistics.multiple_comparisons import fdr_bh, holm, two_sided_p
from lit_llm.statistics.paired import paired_difference
from tests.r_judge import r_adjusted, r_paired_t, r_repeated_measures, r_repeated_measures_of, requires_r
from tests.statistics.simulated import study

pytestmark = requires_r()


def test_the_paired_t_is_rs() -> None:
    """Over the seeds that both arms have."""
    blocks = {seeds: study(np.random.default_rng(seeds), [0.0, 0.1, 0.3], seeds) for seeds in (2, 3, 5, 20)}
    for values in blocks.values():
        values["1"][99] = 1e6  # no run of the baseline has this seed
    pairs = {
        f"{seeds}/{arm}": ([values[arm][seed] for seed in values["0"]], [*values["0"].values()])
        for seeds, values in blocks.items()
        for arm in ("1", "2")
    }
    judge = r_paired_t(pairs)
    assert judge.keys() == pairs.keys()
    for name, expected in judge.items():
        seeds, arm = name.split("/")
        found = paired_difference(blocks[int(seeds)][arm], blocks[int(seeds)]["0"])
        assert found is not None
        assert found.error is not None
        p = two_sided_p(found.mean / found.error, found.degrees)
        ours = {"mean": found.mean, "low": found.low, "high": found.high, "degrees": found.degrees, "p": p}
        assert ours == pytest.approx(expected), name


@pytest.mark.parametrize(("ours", "method"), [(holm, "holm"), (fdr_bh, "BH")])
def test_adjusted_p_values_are_those_of_r(ours, method: str) -> None:
    families = {str(size): np.random.default_rng(size).beta(0.3, 4, size).tolist() for size in (1, 2, 7, 60)}
    families["ties"] = [0.01, 0.01, 0.04, 0.04, 0.9]
    for name, expected in r_adjusted(families, method).items():
        found = ours({str(number): p for number, p in enumerate(families[name])})
        assert [*found.values()] == pytest.approx(expected), name


def factorial(levels: dict[str, int], seeds: int, number: int) -> list[dict[str, object]]:
    """A run for every cell and seed, with effects of the factors and reactions of the seeds to them."""
    random = np.random.default_rng(number)
    shape = (*levels.values(), seeds)
    y = 3 + random.normal(size=shape) + random.normal(0, 2, seeds)
    for axis, size in enumerate(levels.values()):
        along = [1] * len(levels)
        along[axis] = size
        y += random.normal(size=(*along, 1)) + random.normal(size=(*along, seeds))
    cells = itertools.product(*(range(size) for size in shape))
    return [
        {**{name: f"l{at}" for name, at in zip(levels, cell[:-1], strict=True)}, "seed": cell[-1], "y": float(y[cell])}
        for cell in cells
    ]


@pytest.mark.parametrize("levels", [{"a": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 2, "c": 4}])
def test_rs_repeated_measures_are_those_of_statsmodels(levels: dict[str, int]) -> None:
    """Of the judge itself: each term's F is against its interaction with the seed."""
    data = factorial(levels, 4, len(levels))
    judge = AnovaRM(pandas.DataFrame(data), "y", "seed", within=list(levels)).fit().anova_table
    found = r_repeated_measures(data)
    assert list(found) == list(judge.index)
    for term, row in judge.iterrows():
        assert found[term] == pytest.approx((row["F Value"], row["Num DF"], row["Den DF"], row["Pr > F"])), term


def test_a_factor_of_two_levels_is_the_t_test_of_its_contrast_by_seed() -> None:
    """Contrast first: one value a seed, then one sample; two designs by one process."""
    designs = {"small": {"a": 2, "b": 2}, "large": {"a": 3, "b": 2, "c": 2}}
    rows = {name: factorial(levels, 5, 9) for name, levels in designs.items()}
    judge = r_repeated_measures_of(rows)
    assert [len(judge[name]) for name in designs] == [3, 7]
    for name in designs:
        table = pandas.DataFrame(rows[name]).pivot_table(index="seed", columns="b", values="y")
        t = stats.ttest_1samp(table["l1"] - table["l0"], 0)
        assert judge[name]["b"] == pytest.approx((t.statistic**2, 1, t.df, t.pvalue)), name
