"""A retried run in JSON lines, whatever a poll has seen of it: started, retried, started, finished."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lit_llm.report.progress import json_lines
from lit_llm.report.progress.json_lines import Lines

NAME = "red/seed 0"


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """(observer, a function that sets the run's state, a function that returns the events so far)."""
    now = SimpleNamespace(
        step=1, steps=9, loss=1.0, tokens_per_second=1.0, seconds_left=1.0, evaluated=None, metrics={}
    )
    monkeypatch.setattr(json_lines, "progress_of_stage", lambda *_: now)
    status: dict[str, Any] = {"state": "pending"}
    node = SimpleNamespace(fingerprint="f", source=None, kind="pretrain", name="pretrain", after=None, evaluation=None)
    step = SimpleNamespace(node=node, stage=SimpleNamespace(log_file=tmp_path / "log"), status=lambda: dict(status))
    run: Any = SimpleNamespace(
        name=NAME, arm=SimpleNamespace(name="red"), seed=0, steps=[step], name_at=lambda _: NAME, status=step.status
    )
    lines = Lines(stream := io.StringIO(), Console(file=io.StringIO()))
    lines.launching([run], [run], 1)

    def set_state(state: str, started: int) -> None:
        status.update(state=state, started=started)

    def events() -> list[str]:
        named = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
        return [event for event in named if event in ("started", "retried", "finished")]

    return lines, set_state, events


def test_a_run_that_dies_between_two_polls_has_started(watched):
    lines, set_state, events = watched
    set_state("pending", 2)
    lines.restarting(NAME)
    assert events() == ["started", "retried"]


def test_a_run_that_a_poll_sees_dead_is_not_finished_while_it_may_be_retried(watched):
    lines, set_state, events = watched
    set_state("interrupted", 1)
    lines._write_news()
    assert events() == ["started"]
    set_state("pending", 2)
    lines.restarting(NAME)
    set_state("done", 3)
    lines._write_news()
    assert events() == ["started", "retried", "started", "finished"]


@pytest.mark.parametrize("polls", [0, 1])
def test_a_run_that_is_dead_at_the_end_is_finished_once(watched, polls):
    lines, set_state, events = watched
    set_state("interrupted", 1)
    for _ in range(polls):
        lines._write_news()
    lines.finished()
    assert events() == ["started", "finished"]
    lines.finished()
    assert events() == ["started", "finished"]


def test_a_run_that_stays_dead_is_finished_after_a_while(watched, monkeypatch):
    lines, set_state, events = watched
    set_state("interrupted", 1)
    for now, wanted in ((10.0, ["started"]), (10.5, ["started"]), (11.0, ["started", "finished"])):
        monkeypatch.setattr(json_lines.time, "monotonic", lambda now=now: now)
        lines._write_news()
        assert events() == wanted
