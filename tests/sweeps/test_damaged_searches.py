"""What a crash leaves of a sweep's files: the search goes on, or says which file it is and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store.store import Store
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from tests.sweeps.tiny_sweeps import ONE

Write = Callable[..., Path]
SPACE = "space: {model.feed_forward.d_ff: {int: [8, 64]}}\noptimize: [{metric: parameters, direction: minimize}]"


@pytest.fixture
def trials(write_sweep: Write, tmp_path: Path) -> Callable[..., Trials]:
    """The trials of one search that trains nothing, as a process that has just begun sees them."""
    path = write_sweep("damaged", f"{ONE}\n{SPACE}", trials=9)
    return lambda **options: Trials(load_sweep(path), Store(tmp_path / "store").open(), **options)


def states(trials: Trials) -> list[str]:
    """Of what counts: a point that is drawn twice is none."""
    return [trial.state for trial in trials.all() if trial.counts]


def draw(trials: Trials, count: int) -> None:
    with trials.coordinating():
        for _ in range(count):
            trial = trials.next()
            assert trial is not None
            trials.finish(trial, "done", [1.0])


def test_a_torn_last_line_of_the_journal_costs_no_trial(trials: Callable[..., Trials]) -> None:
    """Written in part by a process that was killed, or on a full disk: before a process begins, or while it draws."""
    first = trials()
    draw(first, 2)
    whole = first.journal.read_bytes()
    first.journal.write_bytes(whole + b'{"op_code":5,"worker_id":"a')
    assert states(trials()) == ["done"] * 2
    second = trials()
    with second.coordinating():
        for _ in range(2):
            trial = second.next()
            assert trial is not None
            with second.journal.open("ab") as file:
                file.write(b'{"op_code":5,"worker_id":"b' + b"x" * 100_000)
            second.finish(trial, "done", [1.0])
    assert second.journal.read_bytes().startswith(whole)
    assert [json.loads(line) for line in second.journal.read_text().splitlines()]
    assert states(trials()) == ["done"] * 4


def test_a_damaged_line_amid_the_journal_is_named_with_its_number(trials: Callable[..., Trials]) -> None:
    first = trials()
    draw(first, 2)
    lines = first.journal.read_text().splitlines(keepends=True)
    first.journal.write_text("".join([*lines[:4], "{torn" + lines[4], *lines[5:]]))
    with pytest.raises(InputError, match=r"optuna\.journal:5: is damaged.*cut it off before this line"):
        draw(trials(), 1)


def test_a_line_that_is_json_and_says_nothing_that_optuna_reads_is_named(trials: Callable[..., Trials]) -> None:
    first = trials()
    draw(first, 2)
    whole = first.journal.read_text()
    first.journal.write_text(whole.replace('"study_name"', '"study_nale"', 1))
    for use in (lambda: trials().all(), lambda: draw(trials(), 1)):
        with pytest.raises(InputError, match=r"optuna\.journal: is damaged: Optuna cannot read it"):
            use()


def test_a_sweep_whose_note_is_gone_goes_on_by_its_file(trials: Callable[..., Trials]) -> None:
    first = trials()
    draw(first, 1)
    (first.folder / "runs.json").write_text("[]")
    (first.folder / "sweep.json").unlink()
    draw(trials(), 1)
    assert states(trials()) == ["done"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sweep": "damaged"}'])
def test_a_damaged_note_of_the_sweep_is_written_anew(trials: Callable[..., Trials], content: str) -> None:
    first = trials()
    draw(first, 1)
    note = first.folder / "sweep.json"
    before = note.read_text()
    note.write_text(content)
    draw(trials(), 1)
    assert note.read_text() == before
    assert states(trials()) == ["done"] * 2


def test_a_damaged_note_without_a_journal_asks_where_the_trials_are(
    trials: Callable[..., Trials], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    first = trials(storage=url)
    draw(first, 1)
    (first.folder / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep\.json: is damaged.*--storage"):
        trials()
    draw(trials(storage=url), 1)
    with pytest.raises(InputError, match=r"are in sqlite"):
        trials()
