"""Seeds in rounds: who gets more, that it ends, and that it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.plan import plan
from lit_llm.ablation.run import Watcher, run_study
from lit_llm.ablation.runs import comparison_of, runs_of
from lit_llm.config.problems import InputError
from lit_llm.report.tables import plan_table
from lit_llm.report.text import short
from lit_llm.tracking.store import Store

Study = Callable[..., Path]

ARMS = """
arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {extends: decllm-tiny}}
more_seeds: {most: 4}
"""
MARGIN = "compare: {metric: val/target_nll, margin: 100}"


class Rounds(Watcher):
    def __init__(self) -> None:
        self.todo: list[list[str]] = []

    def launching(self, runs, todo, slots) -> None:  # type: ignore[no-untyped-def]
        self.todo.append([run.name for run in todo])


@pytest.mark.xdist_group("runs")
def test_a_round_follows_while_anything_is_undecided_and_a_second_command_has_nothing_to_do(
    write_study: Study, store: Store
) -> None:
    """Two steps of training tell norms apart by less than their scatter, so there is a round of three and one of four
    seeds; then the seeds are used up."""
    ablation = load_study(write_study("in_rounds", ARMS, seeds=[0, 1]))
    rounds = Rounds()
    finished = run_study(ablation, store, watcher=rounds, slots=2)
    assert rounds.todo[0] == [f"{arm}/seed {seed}" for arm in "abc" for seed in (0, 1)]
    standing = {row.arm: row.seeds for row in finished.comparison.rows}
    assert standing["a"] == max(standing["b"], standing["c"])
    assert len(finished.runs) == sum(standing.values()) == sum(map(len, rounds.todo))
    assert any("looking after each round of seeds" in note for note in finished.comparison.notes)
    again = Rounds()
    second = run_study(ablation, store, watcher=again, slots=2)
    assert again.todo == [[]]
    assert second.comparison == finished.comparison == comparison_of(ablation, runs_of(ablation, store))
    # The same runs under a margin that nothing exceeds: all is decided after the first round.
    decided = load_study(write_study("decided", ARMS + MARGIN, seeds=[0, 1]))
    found = run_study(decided, store, watcher=Rounds(), slots=2).comparison
    assert [(row.seeds, row.verdict) for row in found.rows[1:]] == [(2, "no difference larger than 100")] * 2


def test_the_plan_says_what_it_takes_at_least_and_at_most(write_study: Study) -> None:
    """Twice the seeds, twice the FLOPs."""
    planned = plan(load_study(write_study("in_rounds", ARMS, seeds=[0, 1])), built=False)
    once = sum(arm.cost.train_flops for arm in planned.arms)
    console = Console(width=400, record=True, file=StringIO())
    console.print(plan_table(planned, 400))
    least, most = f"{short(2 * once)}FLOPs at least", f"with 4 seeds of every arm {short(4 * once)}FLOPs"
    assert f"{least}; {most}" in console.export_text()
    assert [(arm["seeds"], arm["most_seeds"]) for arm in planned.as_json()["arms"]] == [([0, 1], 4)] * 3


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("more_seeds: {most: 2}", "2 at most, and there are 2 to begin with"),
        ("more_seeds: {most: 9}\ncompare: {correction: fdr_bh}", "stop at different looks; use `correction: holm`"),
        ("more_seeds: {most: 9}\ncompare: {correction: dunnett, variance: pooled}", "levels are of one look"),
    ],
)
def test_rounds_that_cannot_be_are_refused(more: str, problem: str, write_study: Study) -> None:
    with pytest.raises(InputError, match=problem):
        load_study(write_study("wrong", more, seeds=[0, 1]))


def test_one_seed_is_no_beginning(write_study: Study) -> None:
    with pytest.raises(InputError, match="one seed has no interval"):
        load_study(write_study("one", "more_seeds: {most: 9}", seeds=[0]))
