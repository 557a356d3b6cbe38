"""Two arms on the same items: against statsmodels, scipy and enumeration, and in a simulation without differences."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from lit_llm.evaluation.unit_losses import Units
from lit_llm.statistics import item_differences
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.item_differences import ItemComparison, item_comparison
from lit_llm.statistics.run_results import RunResult

ARMS = ("a", "b")


def losses(random: np.random.Generator, count: int, shift: dict[int, float], scatter: float = 0.2) -> Units:
    """Items of 10 to 99 tokens, with about 3 nats a token."""
    return {
        f"{'web' if at % 2 else 'code'}/{at}": (
            weight * (3.0 + shift.get(at, 0.0) + float(random.normal(0, scatter)) / math.sqrt(weight)),
            float(weight),
        )
        for at, weight in enumerate(map(int, np.random.default_rng(99).integers(10, 100, count)))
    }


def compared(count: int, seeds: int, shift: dict[int, float], number: int = 0) -> ItemComparison:
    random = np.random.default_rng(number)
    pair = [{seed: losses(random, count, given) for seed in range(seeds)} for given in ({}, shift)]
    return item_comparison("test/target_nll", ARMS, *pair)


def ratio(units: Units) -> float:
    return sum(total for total, _ in units.values()) / sum(weight for _, weight in units.values())


def test_the_parts_of_items_and_of_sources_sum_to_the_difference_that_a_report_shows() -> None:
    random = np.random.default_rng(3)
    units = {(arm, seed): losses(random, 12, {0: 1.0 * at}) for at, arm in enumerate(ARMS) for seed in range(3)}
    found = item_comparison("m", ARMS, *({s: units[arm, s] for s in range(3)} for arm in ARMS))
    runs = [
        RunResult(arm, "a", seed, "done", {"metrics": {"m": ratio(each)}, "flops": 1, "parameters": 1},
                  read_units=lambda _, each=each: each)
        for (arm, seed), each in units.items()
    ]  # fmt: skip
    reported = compare(runs, "m").rows[1].difference
    assert reported is not None
    assert found.whole.documents == reported.documents == 12
    assert [found.whole.mean, found.whole.low, found.whole.high] == pytest.approx(
        [reported.mean, reported.low, reported.high]
    )
    for rows in (found.items, found.sources):
        assert sum(row.part for row in rows) == pytest.approx(reported.mean)
        assert sum(row.share for row in rows) == pytest.approx(1)
    assert {row.item for row in found.sources} == {"code", "web"}
    assert found.items[0].item == "code/0"
    assert [abs(row.part) for row in found.items] == sorted((abs(row.part) for row in found.items), reverse=True)


def test_an_item_that_differs_is_shown_among_many_that_do_not() -> None:
    found = compared(40, 5, {7: 1.5})
    assert [row.item for row in found.items if row.p is not None and row.p < 0.05] == ["web/7"]
    assert found.items[0].item == "web/7"
    assert found.items[0].difference.mean == pytest.approx(1.5, abs=0.2)


def test_without_differences_hardly_any_study_shows_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benjamini and Hochberg's p-values: below 0.05 in at most 5% of 200 studies, give or take three deviations."""
    monkeypatch.setattr(item_differences, "FLIPS", 99)
    shown = sum(
        min(row.p for row in compared(20, 3, {}, number).items if row.p is not None) < 0.05 for number in range(200)
    )
    assert shown / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def answers(random: np.random.Generator, count: int, chance: float) -> Units:
    return {str(at): (float(random.random() < chance), 1.0) for at in range(count)}


def test_right_and_wrong_answers_of_one_seed_are_mcnemars_exact_test() -> None:
    random = np.random.default_rng(0)
    a, b = answers(random, 60, 0.4), answers(random, 60, 0.7)
    found = item_comparison("eval/tasks/boolq/acc", ARMS, {0: a}, {0: b})
    (test,) = found.tests
    table = [[sum(a[q][0] == x and b[q][0] == y for q in a) for y in (1, 0)] for x in (1, 0)]
    assert test.method == "McNemar"
    assert test.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (test.lower, test.higher) == (table[0][1], table[1][0])
    assert all(row.p is None and row.difference.low is None for row in found.items)
    assert "one seed" in found.notes[0]


def test_several_seeds_of_answers_have_a_test_each_and_flips_over_all() -> None:
    random = np.random.default_rng(1)
    pair = [{seed: answers(random, 50, chance) for seed in range(3)} for chance in (0.3, 0.6)]
    found = item_comparison("eval/tasks/boolq/acc", ARMS, *pair)
    assert [(test.method, test.seeds) for test in found.tests] == [
        *(("McNemar", (seed,)) for seed in range(3)), ("sign flips", (0, 1, 2))
    ]  # fmt: skip
    assert all(row.p is not None and row.p >= 0.25 for row in found.items)  # 2 / 2^3, of three seeds that agree
    assert "need 6 seeds" in found.notes[0]


def test_flips_of_signs_are_all_of_them_where_they_are_few() -> None:
    found = compared(9, 2, {0: 0.3, 1: 0.2})
    (test,) = found.tests
    parts = [row.part for row in found.items]
    flipped = [
        abs(math.fsum(s * x for s, x in zip(signs, parts, strict=True)))
        for signs in itertools.product((-1, 1), repeat=9)
    ]
    assert test.p == pytest.approx(statistics.fmean(each >= abs(sum(parts)) - 1e-12 for each in flipped))


def test_many_flips_agree_with_a_t_test_of_many_items() -> None:
    found = compared(200, 1, dict.fromkeys(range(200), 0.01), 4)
    parts = [row.part for row in found.items]
    assert found.tests[0].p == pytest.approx(stats.ttest_1samp(parts, 0).pvalue, abs=0.02)


def test_items_that_not_all_runs_have_are_left_out_and_counted() -> None:
    random = np.random.default_rng(0)
    whole, less = losses(random, 6, {}), losses(random, 5, {})
    found = item_comparison("m", ARMS, {0: whole}, {0: less})
    assert len(found.items) == 5
    assert found.notes[0].endswith("judged on them: 1")
    with pytest.raises(ValueError, match="no item"):
        item_comparison("m", ARMS, {0: {"x": (1.0, 1.0)}}, {0: less})
