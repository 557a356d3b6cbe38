"""Seeds in rounds: who gets more, that it ends, and that it goes on where it was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.report.answer import answer
from lit_llm.report.figures.from_comparison import forests
from lit_llm.report.figures.inputs import FigureData
from lit_llm.report.tables.plan import render_plan
from lit_llm.report.text import short
from lit_llm.statistics import alpha_spending
from lit_llm.statistics.baselines import block_differences
from lit_llm.statistics.comparison import Design, compare
from lit_llm.statistics.interims import InterimAnalyses
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.sequential import round_levels
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import interims_in, runs_of
from tests.studies.chosen_results import finish

Study = Callable[..., Path]

ARMS = """
arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {extends: decllm-tiny}}
more_seeds: {max: 4}
"""
MARGIN = "compare: {metric: val/target_nll, margin: 100}"


class Rounds(Observer):
    def __init__(self) -> None:
        self.todo: list[list[str]] = []

    def launching(self, runs, todo, max_parallel) -> None:
        self.todo.append([run.name for run in todo])


def test_a_round_follows_while_anything_is_undecided_and_a_second_command_has_nothing_to_do(
    write_study: Study, tmp_path: Path
) -> None:
    """Two steps of training tell norms apart by less than their scatter, so there is a round of three and one of four
    seeds; then the seeds are used up."""
    store = Store(tmp_path / "store")  # which has no runs of other tests
    ablation = load_study(write_study("in_rounds", ARMS, seeds=[0, 1]))
    rounds = Rounds()
    finished = run_study(ablation, store, observer=rounds, max_parallel=2)
    assert rounds.todo[0] == [f"{arm}/seed {seed}" for arm in "abc" for seed in (0, 1)]
    standing = {row.arm: row.seeds for row in finished.comparison.rows}
    assert standing["a"] == max(standing["b"], standing["c"])
    assert len(finished.runs) == sum(standing.values()) == sum(map(len, rounds.todo))
    assert any("the interim analyses after each round of seeds" in note for note in finished.comparison.notes)
    again = Rounds()
    second = run_study(ablation, store, observer=again, max_parallel=2)
    assert again.todo == [[]]
    assert second.comparison == finished.comparison == comparison_of(ablation, runs_of(ablation, store))
    # The same runs under a margin that nothing exceeds: all is decided after the first round.
    decided = load_study(write_study("decided", ARMS + MARGIN, seeds=[0, 1]))
    found = run_study(decided, store, observer=Rounds(), max_parallel=2).comparison
    assert [(row.seeds, row.verdict) for row in found.rows[1:]] == [(2, "no difference larger than 100")] * 2


def test_the_plan_says_what_it_takes_at_least_and_at_most(write_study: Study) -> None:
    """Twice the seeds, twice the FLOPs."""
    planned = plan(load_study(write_study("in_rounds", ARMS, seeds=[0, 1])), built=False)
    once = sum(arm.cost.train_flops for arm in planned.arms)
    console = Console(width=400, record=True, file=StringIO())
    console.print(render_plan(planned, 400))
    least, most = f"{short(2 * once)}FLOPs at least", f"with 4 seeds of every arm {short(4 * once)}FLOPs"
    assert f"{least}; {most}" in console.export_text()
    assert [(arm["seeds"], arm["most_seeds"]) for arm in planned.as_json()["arms"]] == [([0, 1], 4)] * 3


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("more_seeds: {max: 2}", "2 at most, and there are 2 to begin with"),
        (
            "more_seeds: {max: 9}\ncompare: {correction: fdr_bh}",
            "stop at different interim analyses; use `correction: holm`",
        ),
        ("more_seeds: {max: 9}\ncompare: {correction: dunnett, variance: pooled}", "levels are for a single analysis"),
    ],
)
def test_rounds_that_cannot_be_are_refused(more: str, problem: str, write_study: Study) -> None:
    with pytest.raises(InputError, match=problem):
        load_study(write_study("wrong", more, seeds=[0, 1]))


def test_one_seed_is_no_beginning(write_study: Study) -> None:
    with pytest.raises(InputError, match="one seed has no interval"):
        load_study(write_study("one", "more_seeds: {max: 9}", seeds=[0]))


# --- one split stops, the other is compared -------------------------------------------------------------------------

THREE = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}}\n"
TWO = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}\n"
CALM = [3.0, 3.1, 2.9, 3.0, 3.2]
OPEN = [3.1, 3.0, 2.95, 2.95, 3.3]
"""Of `CALM` it tells nothing apart at any look."""
CLEAR = [4.0, 4.11, 3.92]


def test_an_arm_that_the_validation_split_has_stopped_holds_up_no_other_and_is_judged_by_its_look(
    write_study: Study, tmp_path: Path
) -> None:
    """On the validation split b is plain after three seeds; on the test split it is not, and stays at three."""
    store = Store(tmp_path / "store").open()
    ablation = load_study(write_study("split", f"{THREE}more_seeds: {{max: 5}}", seeds=[0, 1, 2]))
    finish(
        ablation,
        store,
        {"a": CALM, "b": OPEN[:3], "c": OPEN},
        validation={"a": CALM, "b": CLEAR, "c": OPEN},
    )
    runs = runs_of(ablation, store)
    assert Counter(run.arm.name for run in runs) == {"a": 5, "b": 3, "c": 5}
    comparison = comparison_of(ablation, runs)
    assert [(row.arm, row.difference.seeds, row.verdict) for row in comparison.rows if row.difference] == [
        ("b", 3, "undecided"),
        ("c", 5, "undecided"),
    ]
    assert any("decided before the most seeds: b (3)" in note for note in comparison.notes)
    # The first look's level, of a difference whose variance the open arms share in.
    looks = interims_in(store, ablation)
    assert looks is not None
    block = {"a": CALM, "b": OPEN[:3], "c": OPEN}
    first = block_differences({arm: dict(enumerate(v[:3])) for arm, v in block.items()}, "a")["b"]
    found = comparison.rows[1].difference
    assert first is not None
    assert found is not None
    level = round_levels(looks.rounds)[0].difference
    assert (found.low, found.high) == pytest.approx(
        (first.mean - first.half_width(level), first.mean + first.half_width(level))
    )


def test_seeds_are_added_by_intervals_that_count_the_documents(write_study: Study, tmp_path: Path) -> None:
    """The same results, plain over seeds; one document of four makes the whole difference, so more seeds are asked."""
    ablation = load_study(write_study("documents", f"{TWO}more_seeds: {{max: 5}}", seeds=[0, 1, 2]))
    for name, recorded, seeds in (("without", False, 3), ("with", True, 4)):
        store = Store(tmp_path / name).open()
        finish(ablation, store, {"a": CALM[:3], "b": CLEAR})
        for run in runs_of(ablation, store)[: 6 * recorded]:
            value = run.result().metric("val/target_nll")
            assert value is not None
            clear = run.arm.name == "b"
            losses = [value - clear + 4 * clear * (unit == 0) for unit in range(4)]
            assert sum(losses) / 4 == pytest.approx(value)
            line = {"split": "validation", "metric": "target_nll", "source": "", "weight": 1.0, "unit": "document"}
            line |= {"units": [0, 1, 2, 3], "nats": losses, "tokens": [1] * 4, "bytes": None}
            run.last.losses_file.write_text(json.dumps(line) + "\n")
        assert Counter(run.arm.name for run in runs_of(ablation, store)) == {"a": seeds, "b": seeds}


# --- what the looks' levels are not for -----------------------------------------------------------------------------

FACTORS = {
    "effects": "model.attention.output_norm: [none, head], model.attention.qkv_norm: [[], [q, k, v]]",
    "anova": "model.attention.output_norm: [none, head], pretrain.training.optimizer.lr: [1e-3, 3e-3, 1e-2]",
}


@pytest.mark.parametrize("of", FACTORS)
def test_effects_levels_and_f_tests_of_rounds_have_intervals_and_no_verdicts(
    of: str, write_study: Study, tmp_path: Path
) -> None:
    """Planted effects of 0.5 with a scatter of 0.01: without rounds, called; in rounds, estimated."""
    grid = f"grid: {{design: factorial, factors: {{{FACTORS[of]}}}}}\n"
    judged, noted = {}, {}
    for name, more in (("fixed", ""), ("rounds", "more_seeds: {max: 5}\n")):
        store = Store(tmp_path / name).open()
        ablation = load_study(write_study(name, f"{grid}{more}compare: {{correction: holm}}", seeds=[0, 1, 2]))
        values = {
            arm.name: [3 + 0.5 * ("head" in arm.name) + 0.01 * ((7 * n + 3 * seed) % 5) for seed in range(3)]
            for n, arm in enumerate(ablation.arms)
        }
        finish(ablation, store, values)
        comparison = comparison_of(ablation, runs_of(ablation, store))
        tables = getattr(comparison, of)
        rows = [row for one in tables for row in (one.rows if of == "effects" else (*one.terms, *one.levels))]
        assert rows
        judged[name] = [(row.p, row.verdict) for row in rows]
        noted[name] = [note for one in tables for note in one.notes]
        estimates = [row.effect if of == "effects" else row.difference for row in rows if not hasattr(row, "f")]
        assert all(d is not None and d.low is not None for d in estimates)
        assert comparison.rows[-1].verdict is not None  # arms are judged in both
        captions = [drawn.caption for drawn in forests(FigureData(ablation, [], comparison)) if drawn.name == "effects"]
        assert len(captions) == (of == "effects")
        for caption in captions:
            assert ("not adjusted for the interim analyses" in caption) == (name == "rounds")
            assert ("which hold for looking" in caption) is False
            assert ("the verdict" in caption) == (name == "fixed")
    assert any(p is not None and p < 0.05 for p, _ in judged["fixed"])
    assert set(judged["rounds"]) == {(None, None)}
    assert any(note.startswith("p-values") for note in noted["fixed"])
    assert not any(note.startswith("p-values") for note in noted["rounds"])
    assert any("not adjusted for the interim analyses" in note for note in noted["rounds"])


def test_changes_by_finetuning_are_not_called_in_rounds() -> None:
    metric, luck = "finetune/eval/likelihood/nll/text", (0.0, 0.01, 0.03)
    runs = []
    for arm, by in (("a", 0.0), ("b", 0.5)):
        for seed, x in enumerate(luck):
            metrics = {metric: 2 + by + x * (1 + by * x), metric.removeprefix("finetune/"): 3 + x}
            runs.append(RunResult(arm, "a", seed, "done", {"metrics": metrics, "parameters": 1, "flops": 1.0}))
    looks = InterimAnalyses((0, 1, 2, 3), alpha_spending.Rounds(3, 4))
    for design, called in ((Design(), True), (Design(interims=looks), False)):
        found = compare(runs, metric, design)
        assert found.before_after is not None
        assert found.before_after.rows[1].change is not None
        said = " ".join(answer(found)).lower()
        assert ("finetuning changes" in said) == called
        assert any("changes by finetuning are not adjusted" in note for note in found.notes) != called
