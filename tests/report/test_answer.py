"""The sentences of a report, each against the numbers that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from lit_llm.report.answer import answer
from lit_llm.statistics.comparison import Comparison, Design, compare
from lit_llm.statistics.effects import Contrast, Layout
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import RunResult

NLL = "val/target_nll"
LUCK = {0: 0.00, 1: 0.03, 2: -0.02, 3: 0.01, 4: -0.01}
NOISE = {0: 0.001, 1: -0.002, 2: 0.0015, 3: -0.001, 4: 0.0005}


def runs(arms: dict[str, float], seeds: Sequence[int] = tuple(LUCK), baseline: str = "base") -> list[RunResult]:
    """Arms whose loss lies so far above 3; every other one scatters the other way."""
    return [
        RunResult(
            arm,
            baseline,
            seed,
            "done",
            {"metrics": {NLL: 3 + offset + LUCK[seed] + NOISE[seed] * (-1) ** place}, "parameters": 1, "flops": 1.0},
        )
        for place, (arm, offset) in enumerate(arms.items())
        for seed in seeds
    ]


def pending(arm: str, seeds: Sequence[int], state: str = "pending") -> list[RunResult]:
    return [RunResult(arm, "base", seed, state) for seed in seeds]


def said(found: Comparison) -> tuple[str, str]:
    first, *further = answer(found)
    return first, " ".join(further)


def test_each_of_few_arms_is_named_with_its_amount_and_its_interval() -> None:
    found = compare(runs({"base": 0.0, "good": -0.2, "bad": 0.1}), NLL)
    first, _ = said(found)
    good, bad = (next(row.difference for row in found.rows if row.arm == arm) for arm in ("good", "bad"))
    assert f"good is better than base by {-good.mean:.3f} [{-good.high:.3f}, {-good.low:.3f}]" in first
    assert f"bad is worse than base by {bad.mean:.3f} [{bad.low:.3f}, {bad.high:.3f}]" in first
    assert first.startswith(f"In {NLL} (lower is better), ")


def test_one_arm_alone_is_its_number_in_the_metrics_own_spelling() -> None:
    assert (
        said(compare(runs({"base": 0.0}, [2]), NLL))[0]
        == f"In {NLL} (lower is better): base {3 - 0.02 + 0.0015:.3f} (1 seed)."
    )


def test_many_arms_are_counted_and_named_in_the_studys_order_without_a_ranking() -> None:
    arms = {"base": 0.0, "a": -0.1, "b": -0.3, "c": 0.2, "d": 0.0, "e": 0.0}
    first, further = said(compare(runs(arms), NLL))
    assert "of 5 arms against base, 2 are better (a by 0.100 [" in first
    assert "1 is worse (c by 0.200" in first
    assert first.endswith("2 are undecided (5 seeds; not adjusted for 5 comparisons).")
    assert "Undecided does not mean equal" in further


def test_where_nothing_is_shown_that_is_the_answer() -> None:
    arms = {"base": 0.0, "a": 0.0005, "b": -0.0003, "c": 0.0, "d": 0.0004}
    first, _ = said(compare(runs(arms), NLL))
    assert "none of 4 arms is shown to differ from base: 4 undecided (5 seeds; not adjusted for 4 comp" in first
    holm, _ = said(compare(runs(arms), NLL, procedure=Procedure(correction="holm")))
    assert holm.endswith("4 undecided (5 seeds; adjusted for 4 comparisons by Holm's method).")


def test_one_seed_is_said_to_say_nothing_of_how_sure_it_is() -> None:
    first, _ = said(compare(runs({"base": 0.0, "good": -0.2}, seeds=[0]), NLL))
    assert "good differs from base by -0.202, and one seed does not say how sure that is" in first


def test_a_margin_changes_the_words() -> None:
    arms = {"base": 0.0, "same": 0.0005, "far": 0.3}
    first, _ = said(compare(runs(arms), NLL, procedure=Procedure(margin=0.05)))
    assert "same shows no difference larger than 0.05 from base" in first
    assert "far is worse than base" in first


def test_what_is_not_finished_is_said_first() -> None:
    none, _ = said(compare(pending("base", [0, 1]) + pending("a", [0, 1]), NLL))
    assert none == f"Not answered yet: none of 4 runs has a {NLL}."
    some = compare(runs({"base": 0.0, "good": -0.2}) + pending("late", range(5)), NLL)
    assert said(some)[0].startswith("So far, with 10 of 15 runs finished: in ")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("diverged", "2 runs diverged, which is a result, and are in no mean (lost 2)."),
        ("failed", "2 runs failed (lost 2)."),
        ("out_of_memory", "2 runs ran out of memory (lost 2)."),
        ("interrupted", "2 runs were interrupted (lost 2)."),
    ],
)
def test_runs_without_a_value_are_named(state: str, words: str) -> None:
    assert words in said(compare(runs({"base": 0.0, "good": -0.2}) + pending("lost", [0, 1], state), NLL))[1]


def test_what_an_arm_costs_stands_in_its_clause() -> None:
    arms = runs({"base": 0.0, "good": -0.2})
    dear = [replace(run, result={**run.result, "flops": 1.8}) if run.arm == "good" else run for run in arms]
    assert "] at 1.8 times the training FLOPs (5 seeds)." in said(compare(dear, NLL))[0]
    assert "FLOPs" not in said(compare(arms, NLL))[0]


def test_divergence_is_told_with_its_rates_a_test_and_bounds() -> None:
    """Three of five seeds against none: McNemar's exact p is 2 / 2³."""
    lost = [
        replace(run, state="diverged", result={**run.result, "metrics": {}, "initial": {NLL: 9.0}})
        if run.arm == "good" and run.seed > 1
        else run
        for run in runs({"base": 0.0, "good": -0.2})
    ]
    first, further = said(compare(lost, NLL))
    assert "no difference between good and base is shown (" in first
    assert ": runs were lost (2 seeds)" in first
    assert "3 of 5 runs of good diverged, and 0 of 5 of base (exact test over shared seeds, p = 0.25)" in further
    base, good = (
        [run.result["metrics"][NLL] for run in runs({"base": 0.0, "good": -0.2}) if run.arm == arm]
        for arm in ("base", "good")
    )
    best = (sum(good[:2]) + 3 * min(good[:2])) / 5 - sum(base) / 5
    worst = (sum(good[:2]) + 3 * 9.0) / 5 - sum(base) / 5
    assert f"the difference lies between {best:+.3f} and {worst:+.3f}." in further


def test_the_effects_of_a_design_come_first_and_an_interaction_by_the_levels_that_it_is_of() -> None:
    """a helps without b and harms with it: the mean effect, +0.1, is that of no arm."""
    arms = {"base": 0.0, "a": -0.2, "b": 0.0, "ab": 0.4}
    layout = Layout(
        "base",
        {"base": (0, 0), "a": (1, 0), "b": (0, 1), "ab": (1, 1)},
        (
            Contrast("A", ("x.norm",), ("head", "none"), (0,)),
            Contrast("B", ("x.lr",), ("1", "2"), (1,)),
            Contrast("AB", ("x.norm", "x.lr"), (), (0, 1)),
        ),
    )
    first, further = said(compare(runs(arms), NLL, Design([layout])))
    assert first.startswith("Of 3 effects of the factors, 3 are shown: norm (head → none) +0.100 [")
    assert "The effect of norm turns its sign with lr: -0.200 [" in further
    assert "] at 1, +0.400 [" in further


def test_the_effects_of_a_design_are_the_answer() -> None:
    arms = {"base": 0.0, "a": 0.4, "b": 0.1, "ab": 0.5}
    layout = Layout(
        "base",
        {"base": (0, 0), "a": (1, 0), "b": (0, 1), "ab": (1, 1)},
        (Contrast("A", ("x.norm",), ("head", "none"), (0,)), Contrast("B", ("x.lr",), ("1", "2"), (1,))),
    )
    first, further = said(compare(runs(arms), NLL, Design([layout])))
    assert first.startswith("Of 2 effects of the factors, 2 are shown: norm (head → none) +0.400 [")
    assert "of 3 arms" not in first
    assert "a is worse than base" in further
