"""The sentences of a report, each against the numbers that it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lit_llm.analysis.comparison import Comparison, Design, RunResult, compare
from lit_llm.analysis.effects import Contrast, Layout
from lit_llm.analysis.procedure import Procedure
from lit_llm.report.answer import answer

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


def test_many_arms_are_counted_and_the_extremes_named() -> None:
    arms = {"base": 0.0, "a": -0.1, "b": -0.3, "c": 0.2, "d": 0.0, "e": 0.0}
    first, further = said(compare(runs(arms), NLL))
    assert "of 5 arms against base, 2 are better (most of all b, by 0.300" in first
    assert "1 is worse (c, by 0.200" in first
    assert "undecided" in first
    assert "Undecided is not equal" in further


def test_where_nothing_is_shown_that_is_the_answer() -> None:
    arms = {"base": 0.0, "a": 0.0005, "b": -0.0003, "c": 0.0, "d": 0.0004}
    first, _ = said(compare(runs(arms), NLL))
    assert first.endswith("none of 4 arms is shown to differ from base: 4 undecided.")


def test_one_seed_is_said_to_say_nothing_of_how_sure_it_is() -> None:
    first, _ = said(compare(runs({"base": 0.0, "good": -0.2}, seeds=[0]), NLL))
    assert "good differs from base by -0.202 with one seed, which does not say how sure that is" in first


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


def test_the_largest_effect_of_a_design_is_the_answer() -> None:
    arms = {"base": 0.0, "a": 0.4, "b": 0.1, "ab": 0.5}
    layout = Layout(
        "base",
        {"base": (0, 0), "a": (1, 0), "b": (0, 1), "ab": (1, 1)},
        (Contrast("A", ("x.norm",), ("head", "none"), (0,)), Contrast("B", ("x.lr",), ("1", "2"), (1,))),
    )
    first, further = said(compare(runs(arms), NLL, Design([layout])))
    assert first.startswith(
        "Of 2 effects of the factors, 2 are shown; the largest is that of norm (head → none): +0.400 ["
    )
    assert "of 3 arms" not in first
    assert "a is worse than base" in further
