"""`lit-llm store`, and what `run` and `ui` say of a moved store: on a store that real runs have filled."""

from __future__ import annotations

import os
import pty
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, run_study
from tests.commands import command, in_a_process, lit_llm

Study = Callable[..., Path]
COLUMNS = {"COLUMNS": "400"}


class Told(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.todo: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def launching(self, runs: object, todo: object, max_parallel: int) -> None:
        self.todo = [run.name for run in todo]  # type: ignore[attr-defined]


def run(
    path: Path, store: Store, overrides: list[str] | None = None, new_version: bool = False
) -> tuple[Told, set[str]]:
    """What was told, and the fingerprints of the study's stages."""
    told = Told()
    finished = run_study(
        load_study(path, overrides or []), store, observer=told, max_parallel=2, new_version=new_version
    )
    assert finished.exit_code == 0
    return told, {run.last.fingerprint for run in finished.runs}


def there(store: Store) -> set[str]:
    return {folder.name for folder in (store.root / "stages").iterdir()}


def store_command(*arguments: object) -> str:
    answer = CliRunner().invoke(app, ["store", *map(str, arguments)], env=COLUMNS)
    assert answer.exit_code == 0, answer.output
    return answer.output


def answer_in_a_terminal(store: Store, answer: bytes) -> str:
    """What `store gc` prints when somebody sits there and types this."""
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    line = command("store", "gc", "--store", store.root)
    told = subprocess.run(line, stdin=theirs, capture_output=True, text=True, env=os.environ | COLUMNS)
    os.close(ours)
    os.close(theirs)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_gc_gives_up_what_an_edited_study_no_longer_lists_and_nothing_else(write_study: Study, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    path = write_study("edited", "arms: {red: {}}", seeds=[0, 1])
    _, trial = run(path, store, ["pretrain.training.max_steps=9"])
    _, first = run(path, store, new_version=True)  # the version before keeps its list
    path.write_text(path.read_text().replace("seeds: [0, 1]", "seeds: [1, 2]"))
    _, second = run(path, store)
    orphans = first - second
    assert len(orphans) == 1
    assert there(store) == first | trial | second
    listed = store_command("gc", "--store", store.root)
    assert f"stages/{next(iter(orphans))}" in listed
    assert "1 to remove" in listed
    assert "Nothing was removed: --yes does it without asking." in listed
    assert "Nothing was removed." in answer_in_a_terminal(store, b"n\n")
    assert there(store) == first | trial | second
    assert "Removed 1" in answer_in_a_terminal(store, b"y\n")
    assert there(store) == trial | second
    told, _ = run(path, store)
    assert told.todo == []
    (store.root / "studies" / "edited" / "runs.json").unlink()
    assert "has no readable list of its runs" in store_command("gc", "--store", store.root, "--yes")
    assert there(store) == trial | second


def test_a_moved_store_is_told_of_by_ui_until_a_run_or_rebase_mends_it(
    write_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    old, new = tmp_path / "old", tmp_path / "new"
    one, two = write_study("one", "arms: {red: {}}"), write_study("two", "arms: {red: {}}")
    for path in (one, two):
        told = lit_llm("run", path, "--store", old)
        assert (told.returncode, "was moved from" in told.stdout) == (0, False), told.stderr
    with closing(sqlite3.connect(old / "mlflow.db")) as connection:  # this process has not closed it
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    old.rename(new)
    holding = {file.name for file in new.rglob("*") if file.is_file() and str(old).encode() in file.read_bytes()}
    assert holding == {"mlflow.db", "report.html"}  # the page has the commands; all else is relative to the store
    monkeypatch.setattr(os, "execv", lambda *_: None)
    message = CliRunner().invoke(app, ["ui", "--store", str(new)], env=COLUMNS).output
    assert f"This store was moved from {old}: MLflow still looks there for the files of one, two." in message
    assert f"`lit-llm store rebase --store {new}`" in message
    assert f"from {old}\nto   {new}\n" in store_command("rebase", "--store", new)
    assert "nothing was changed" in store_command("rebase", "--store", new)
    assert "was moved from" not in CliRunner().invoke(app, ["ui", "--store", str(new)], env=COLUMNS).output
    again = new.rename(tmp_path / "again")
    assert "0 of 1 runs to do" in in_a_process("run", one, "--store", again).stdout  # mends them as well
    assert "was moved from" not in CliRunner().invoke(app, ["ui", "--store", str(again)], env=COLUMNS).output
    assert not old.exists()
    assert not new.exists()


@pytest.mark.parametrize("name", ["rebase", "gc"])
def test_a_folder_that_is_no_store_is_one_message(tmp_path: Path, name: str) -> None:
    told = lit_llm("store", name, "--store", tmp_path)
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 2
    assert told.stderr.startswith(f"--store: {tmp_path} ")
