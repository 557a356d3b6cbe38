"""The analysis that the first run freezes: what is logged of changes and looks, and that no damage stops a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.config.hashing import fingerprint
from lit_llm.report.pages.frozen_analysis import details, summary
from lit_llm.store.store import Store
from lit_llm.studies.analysis_plan import (
    FROZEN,
    LOG,
    Registration,
    analysis_of,
    log_comparison,
    register,
    registration_of,
)
from lit_llm.studies.comparison import comparison_of, note_comparison
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.runs import interims_in, register_analysis, runs_of
from tests.studies.chosen_results import NLL, finish

Study = Callable[..., Path]
ARMS = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}\n"


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


def frozen(ablation: Ablation, store: Store) -> Registration:
    """After its analysis was registered once more."""
    store.study(ablation.study.study).mkdir(parents=True, exist_ok=True)
    assert register_analysis(store, ablation, runs_of(ablation, store)) == []
    found = registration_of(store.study(ablation.study.study))
    assert found is not None
    return found


def test_the_first_run_freezes_the_analysis_once(write_study: Study, place: Store) -> None:
    ablation = load_study(write_study("once", ARMS + "compare: {margin: 0.02, correction: holm}", seeds=[0, 1]))
    found = frozen(ablation, place)
    assert found.plan == {
        "question": "Does it hold?",
        "metric": NLL,
        "margin": 0.02,
        "correction": "holm",
        "baseline": None,
        "stratify_by": [],
        "baselines": {"a": "a", "b": "a"},
        "seeds": [0, 1],
        "more_seeds": None,
        "variance": "moderated",
        "front": None,
        "scaling": None,
        "gate": None,
    }
    content = json.loads((place.study("once") / FROZEN).read_text())
    assert content["hash"] == found.hash == fingerprint(analysis_of(ablation))
    assert frozen(ablation, place) == found
    assert not (place.study("once") / LOG).exists()
    assert summary(found).startswith(f"analysis {found.hash}: as frozen on 20")
    assert "before any result" in summary(found)


def test_each_later_change_is_logged_with_the_results_that_had_finished(write_study: Study, place: Store) -> None:
    first = load_study(write_study("changed", ARMS, seeds=[0, 1]))
    frozen(first, place)
    early = load_study(write_study("changed", ARMS + "compare: {margin: 0.5}", seeds=[0, 1]))
    assert [change.finished for change in frozen(early, place).changes] == [0]
    assert "changed before any result: margin" in summary(registration_of(place.study("changed")))
    finish(early, place, {"a": [3.0, 3.1], "b": [3.2, 3.4]})
    more = ARMS.replace("}}}}", "}}}, c: {extends: decllm-tiny}}")
    late = load_study(write_study("changed", more + "compare: {metric: val/perplexity, baseline: b}", seeds=[0, 1, 2]))
    found = frozen(late, place)
    last = found.changes[-1]
    assert last.finished == 4
    assert last.changes["metric"] == (NLL, "val/perplexity")
    assert last.changes["margin"] == (0.5, None)
    assert last.changes["seeds"] == ([0, 1], [0, 1, 2])
    assert found.current == analysis_of(late)
    assert found.hash == fingerprint(analysis_of(first))
    said = summary(found)
    assert "CHANGED after 4 results: metric, margin, baseline, baselines, seeds" in said
    sentence = next(line for line in details(found) if "after 4 results" in line)
    assert f"metric {NLL} → val/perplexity" in sentence
    assert "1 arm added (c); 2 arms with another baseline (a, b)" in sentence


def test_a_bar_that_is_moved_after_the_results_is_logged_and_a_label_is_not(write_study: Study, place: Store) -> None:
    def study(compare: str) -> Ablation:
        return load_study(write_study("bar", f"{ARMS}compare: {{{compare}}}", seeds=[0, 1]))

    first = study("gate: {at_least: 1.2}, front: parameters")
    frozen(first, place)
    finish(first, place, {"a": [3.0, 3.1], "b": [3.2, 3.4]})
    assert frozen(study("gate: {at_least: 1.2}, front: parameters, labels: {a: A}, columns: [n]"), place).changes == ()
    moved = frozen(study("gate: {at_least: 1.05}, front: train_flops, scaling: {}"), place)
    (change,) = moved.changes
    assert change.finished == 4
    assert change.changes.keys() == {"gate", "front", "scaling"}
    assert [own["at_least"] for own in change.changes["gate"]] == [1.2, 1.05]
    assert "CHANGED after 4 results: front, scaling, gate" in summary(moved)
    assert "at_least: 1.2" in (said := " ".join(details(moved)))
    assert "at_least: 1.05" in said


def test_a_study_that_begins_with_results_does_not_say_before_any_result(write_study: Study, place: Store) -> None:
    """Another study has trained these runs."""
    ablation = load_study(write_study("late", ARMS, seeds=[0, 1]))
    finish(ablation, place, {"a": [3.0], "b": [3.2]})
    assert "after 2 results" in summary(frozen(ablation, place))


def test_two_looks_at_the_same_results_are_one(write_study: Study, place: Store) -> None:
    ablation = load_study(write_study("looked", ARMS, seeds=[0, 1, 2]))
    folder = place.study("looked")

    def look(of: Ablation) -> int:
        note_comparison(place, of, runs_of(of, place), comparison_of(of, runs_of(of, place)))
        found = registration_of(folder)
        return len(found.comparisons) if found else 0

    assert look(ablation) == 0  # never run
    frozen(ablation, place)
    assert look(ablation) == 0  # nothing to see
    finish(ablation, place, {"a": [3.0, 3.1], "b": [3.2, 3.4]})
    assert [look(ablation), look(ablation)] == [1, 1]
    finish(ablation, place, {"a": [3.0, 3.1, 3.05], "b": [3.2, 3.4, 3.1]})
    assert look(ablation) == 2
    assert look(load_study(write_study("looked", ARMS + "compare: {margin: 1}", seeds=[0, 1, 2]))) == 3
    found = registration_of(folder)
    assert found is not None
    assert [one.finished for one in found.comparisons] == [4, 6, 6]
    assert found.comparisons[0].seeds == 2


def test_a_study_of_one_arm_has_no_analysis(write_study: Study, place: Store) -> None:
    ablation = load_study(write_study("alone", "arms: {a: {}}", seeds=[0]))
    assert register_analysis(place, ablation, ()) == []
    assert registration_of(place.study("alone")) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (FROZEN, "{half a", "cannot be read: what was frozen is not known"),
        (
            FROZEN,
            '{"plan": {"metric": "other"}, "hash": "0", "time": 1, "finished": 0}',
            "what was frozen is not known",
        ),
        (
            FROZEN,
            '{"plan": {"seeds": [0], "more_seeds": null}, "hash": "0", "time": 1, "finished": 0}',
            "was edited after it was frozen",
        ),
        (FROZEN, None, "is missing: what was frozen is not known"),
        (LOG, '{"event": "look"}\n\x00\n[1]\n', f"{LOG}:1 cannot be read"),
        (LOG, '{"event": "look", "time": 1, "finished": 2, "ke', f"{LOG}:1 cannot be read"),
    ],
)
def test_damage_is_a_line_of_the_report_and_no_traceback(
    file: str, content: str | None, message: str, write_study: Study, place: Store
) -> None:
    path = write_study("damaged", ARMS, seeds=[0, 1])
    ablation = load_study(path)
    frozen(ablation, place)
    finish(ablation, place, {"a": [3.0, 3.1], "b": [3.2, 3.4]})
    log_comparison(place, ablation, comparison_of(ablation, runs_of(ablation, place)))
    damaged = place.study("damaged") / file
    if content is None:
        damaged.unlink()
    else:
        damaged.write_text(content)
    result = CliRunner().invoke(app, ["report", str(path), "--store", str(place.root)])
    assert (result.exit_code, result.exception) == (0, None), result.output
    assert message in result.output
    assert message in (place.study("damaged") / "comparison.md").read_text()


def test_a_line_after_a_torn_one_is_read(write_study: Study, place: Store) -> None:
    ablation = load_study(write_study("torn", ARMS, seeds=[0, 1]))
    frozen(ablation, place)
    log = place.study("torn") / LOG
    log.write_text('{"event": "look", "time": 1')
    found = frozen(load_study(write_study("torn", ARMS + "compare: {margin: 1}", seeds=[0, 1])), place)
    assert len(found.changes) == len(found.problems) == 1


def test_several_processes_write_whole_lines_and_freeze_once(write_study: Study, place: Store) -> None:
    studies = [load_study(write_study("busy", f"{ARMS}compare: {{margin: {n}}}", seeds=[0, 1])) for n in (1, 2, 3)]
    place.study("busy").mkdir(parents=True)
    with ThreadPoolExecutor(6) as pool:
        problems = [*pool.map(lambda ablation: register(place, ablation, lambda: 7), studies * 8)]
    assert not any(problems)
    found = registration_of(place.study("busy"))
    assert found is not None
    assert found.problems == ()
    margins = [found.plan["margin"], *(change.changes["margin"] for change in found.changes)]
    for before, (old, new) in zip([margins[0], *(pair[1] for pair in margins[1:])], margins[1:], strict=False):
        assert before == old != new  # each change begins where the one before it ended


# --- seeds in rounds ------------------------------------------------------------------------------------------------

EQUAL = {"a": [3.0, 3.1, 2.9, 3.0, 3.2, 3.1, 3.0, 2.9], "b": [3.1, 3.0, 2.95, 2.95, 3.3, 3.0, 3.1, 2.8]}
"""Eight seeds that tell nothing apart at any look."""


def until(count: int) -> dict[str, list[float]]:
    return {arm: values[:count] for arm, values in EQUAL.items()}


def in_rounds(write_study: Study, most: int) -> Ablation:
    return load_study(write_study("grown", f"{ARMS}more_seeds: {{max: {most}}}", seeds=[0, 1, 2]))


def test_raising_the_most_seeds_after_the_last_look_leaves_nothing_to_decide_by(
    write_study: Study, place: Store
) -> None:
    before = in_rounds(write_study, 5)
    frozen(before, place)
    finish(before, place, until(5))
    raised = in_rounds(write_study, 8)

    def said() -> tuple[list[int], str]:
        looks, comparison = interims_in(place, raised), comparison_of(raised, runs_of(raised, place))
        assert looks is not None
        return list(looks.rounds.past_sizes), " ".join(comparison.notes)

    unlogged = said()  # `status` and `report` look before anything is logged
    assert frozen(raised, place).changes[-1].seeds_analysed == 5
    assert said() == unlogged
    assert unlogged[0] == [3, 4, 5]
    assert "all of the 5% is spent" in unlogged[1]


def test_raising_them_between_looks_spends_what_is_left(write_study: Study, place: Store) -> None:
    before = in_rounds(write_study, 5)
    frozen(before, place)
    finish(before, place, until(4))
    raised = in_rounds(write_study, 8)
    frozen(raised, place)
    finish(raised, place, until(8))
    looks, comparison = interims_in(place, raised), comparison_of(raised, runs_of(raised, place))
    assert looks is not None
    assert looks.rounds.past_sizes == (3, 4)
    assert looks.rounds.shares[-1] == pytest.approx(1)
    assert looks.rounds.shares[1] < 1
    assert any("keep their levels, and the 14% of the 5%" in note for note in comparison.notes)
    assert comparison.rows[1].seeds == 8


def test_the_looks_of_before_are_those_by_the_margin_of_before(write_study: Study, place: Store) -> None:
    """A margin that would have decided at three seeds takes back no look at four."""
    before = in_rounds(write_study, 5)
    frozen(before, place)
    finish(before, place, until(4))
    wide = f"{ARMS}more_seeds: {{max: 8}}\ncompare: {{margin: 9}}"
    last = frozen(load_study(write_study("grown", wide, seeds=[0, 1, 2])), place).changes[-1]
    assert (last.seeds_analysed, last.finished) == (4, 8)


def test_rounds_after_a_look_at_a_fixed_number_of_seeds_know_of_it(write_study: Study, place: Store) -> None:
    fixed = load_study(write_study("grown", ARMS, seeds=[0, 1, 2]))
    frozen(fixed, place)
    finish(fixed, place, until(3))
    fresh = interims_in(place, in_rounds(write_study, 6))
    assert fresh is not None
    assert fresh.rounds.past == ()  # nobody has looked
    log_comparison(place, fixed, comparison_of(fixed, runs_of(fixed, place)))
    raised = in_rounds(write_study, 6)
    for _ in range(2):  # before the change is logged, and after
        looks = interims_in(place, raised)
        assert looks is not None
        assert (looks.rounds.past_sizes, looks.rounds.shares[-1]) == ((3,), 1.0)
        frozen(raised, place)


def test_looks_at_seeds_that_were_replaced_stay_spent(write_study: Study, place: Store) -> None:
    before = in_rounds(write_study, 5)
    frozen(before, place)
    finish(before, place, until(3))
    other = load_study(write_study("grown", f"{ARMS}more_seeds: {{max: 5}}", seeds=[7, 8, 9]))
    looks = interims_in(place, other)
    assert looks is not None
    assert looks.rounds.past == ()
    assert looks.rounds.lost == pytest.approx(interims_in(place, before).rounds.shares[0])


def test_holm_and_rounds_go_together(write_study: Study, place: Store) -> None:
    arms = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}}"
    more = f"{arms}\nmore_seeds: {{max: 5}}\ncompare: {{correction: holm}}"
    ablation = load_study(write_study("holm", more, seeds=[0, 1, 2]))
    finish(ablation, place, until(5) | {"c": [4.0, 4.11, 3.92]})
    comparison = comparison_of(ablation, runs_of(ablation, place))
    looks = interims_in(place, ablation)
    assert looks is not None
    assert looks.comparisons == 2
    assert [(row.seeds, row.verdict) for row in comparison.rows[1:]] == [(5, "undecided"), (3, "worse")]
    assert any("of all 2 arms together" in note for note in comparison.notes)
    assert comparison.bias_adjusted == {}  # the one went on to the end, the other was stopped by the first look
